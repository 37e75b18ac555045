"""How much the file systems that a cell may write to hold. On their own: a supervisor names them without loading what builds a root."""

MIB = 1 << 20
WORK_BYTES, WORK_INODES = 256 * MIB, 16384
TMP_BYTES, TMP_INODES = 64 * MIB, 4096
SHM_BYTES = 64 * MIB
