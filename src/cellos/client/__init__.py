"""CellOS from Python."""
