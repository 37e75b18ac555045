"""Digests of a spec: of the bytes that were read, and of what they mean."""

from __future__ import annotations

from cellos.core.documents.execution_cell import CellSpec


def raw_spec_hash(raw: bytes) -> str:
    """SHA-256 of a document as it was read: 64 lower-case hex digits."""
    from cellos.core.sha256 import sha256

    return sha256(raw).hexdigest()


def canonical_spec_hash(spec: CellSpec) -> str:
    """SHA-256 of the canonical form of `spec` as compact UTF-8 JSON: `sha256:` and 64 lower-case hex digits.

    Two documents that differ only in blanks, order of members, or defaults written out have the same.
    """
    from msgspec import json

    from cellos.core.documents.forms import canonical_form
    from cellos.core.sha256 import sha256

    return f"sha256:{sha256(json.encode(canonical_form(spec))).hexdigest()}"
