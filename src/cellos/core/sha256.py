"""SHA-256 without OpenSSL: `hashlib` loads libcrypto, which costs a one-shot run more than all its digests together (2.5 ms)."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import sha256
else:
    import sys

    try:
        if sys.version_info >= (3, 12):
            from _sha2 import sha256
        else:
            from _sha256 import sha256
    except ImportError:  # an interpreter built without it
        from hashlib import sha256

__all__ = ["sha256"]
