"""The JSON Schemas of the policy documents, generated from the structs, so that editors and other languages check what we check."""

from __future__ import annotations

from typing import Any

import msgspec

from cellos.core.documents.schema import DIALECT, readable
from cellos.core.policy.authz import AuthorizationPolicy
from cellos.core.policy.pack import PolicyPack


def policy_pack_schema() -> dict[str, Any]:
    """The shape of a PolicyPack. That its version is supported and its rules do not contradict each other is beyond a schema."""
    return {"$schema": DIALECT, "title": "PolicyPack", **readable(msgspec.json.schema(PolicyPack))}


def authorization_policy_schema() -> dict[str, Any]:
    """The shape of an AuthorizationPolicy."""
    return {"$schema": DIALECT, "title": "AuthorizationPolicy", **readable(msgspec.json.schema(AuthorizationPolicy))}
