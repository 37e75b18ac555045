"""One cell from one document: admission, the run itself, its events and its record on this host."""
