"""Linux primitives for isolation, and the two small processes that use them: the launcher and the init of a cell.

Nothing here imports anything else of CellOS, so that the launcher stays small: its size is paid for at every fork. (The launcher's process
begins with `cellos.compiled`, which finds these modules faster and is needed no more afterwards.)
Every function either does what it says or raises OSError with the kernel's errno.
"""
