"""SHA-256 without OpenSSL: `hashlib` loads libcrypto, which costs a one-shot run more than all its digests together (2.5 ms)."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import sha256
else:
    try:
        from _sha2 import sha256  # Python 3.12 and later
    except ImportError:
        try:
            from _sha256 import sha256  # Python 3.11
        except ImportError:  # an interpreter built without them
            from hashlib import sha256

__all__ = ["sha256"]
