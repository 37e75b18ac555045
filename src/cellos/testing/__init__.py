"""Fakes of the ports and the suites that every implementation of a port must pass, for our own tests and for those of embedders."""
