"""The digest without OpenSSL is the digest."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from cellos.core.sha256 import sha256


@given(st.binary(max_size=200))
def test_it_is_sha256(data: bytes) -> None:
    assert sha256(data).hexdigest() == hashlib.sha256(data).hexdigest()


def test_openssl_stays_out_of_a_start() -> None:
    script = "import sys; from cellos.core.sha256 import sha256; sys.exit('_hashlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
