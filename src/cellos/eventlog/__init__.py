"""Where events go: the run's spool first, then the JSONL file."""
