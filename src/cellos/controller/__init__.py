"""What takes admitted formations to their end: it folds the log and writes what is to be done next. Any number of controllers may run."""
