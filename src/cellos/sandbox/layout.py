"""What a supervisor has to know of a cell's root without loading what builds it: sizes and places."""

MIB = 1 << 20
WORK_BYTES, WORK_INODES = 256 * MIB, 16384
TMP_BYTES, TMP_INODES = 64 * MIB, 4096
SHM_BYTES = 64 * MIB
INOTIFY_INSTANCES, INOTIFY_WATCHES = 32, 32768

SOCKET_PATH = "/run/cellos/secrets.sock"
"""Where programs in the cell reach whoever listens on the cell's socket."""
