"""What the processes that stay have in common: their log, their end, their exit codes."""
