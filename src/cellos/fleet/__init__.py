"""Cells from a queue that is nothing but a bucket: each document is claimed once, and its end is written once."""
