"""Messages to a cell's init: a marshalled value behind its length.

marshal and not JSON, because it is part of every interpreter: `json` takes the launcher 10 ms to import. Both ends are the same
interpreter, and only trusted ones are read: init never writes this form.
"""

from __future__ import annotations

import marshal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

LENGTH_BYTES = 4


def framed(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message."""
    data = marshal.dumps(dict(message))
    return len(data).to_bytes(LENGTH_BYTES, sys.byteorder) + data
