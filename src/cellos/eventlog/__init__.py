"""Where events go: the run's spool first, then the JSONL file or NATS; and the event log, from which others read them."""
