"""What makes a record of events evidence: redaction before anything is kept, and a chain that shows every later change."""
