"""`cellos-node`: runs members of formations in cells of this host."""
