"""The pure heart: documents, authority, events, evidence, state machines. Nothing here does I/O, reads a clock or draws random bytes."""
