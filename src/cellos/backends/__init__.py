"""What isolates: implementations of `cellos.ports.CellBackend`."""
