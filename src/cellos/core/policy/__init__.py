"""Policy: what an operator demands of every cell beyond the rules of the document, as two documents and pure judgements over them."""

from cellos.core.policy.authz import AuthorizationPolicy, Denial, authorize, rate_denial, read_authorization_policy
from cellos.core.policy.pack import PolicyPack, Violation, applies, bounded, caller_refusal, read_policy_pack, violations

__all__ = [
    "AuthorizationPolicy",
    "Denial",
    "PolicyPack",
    "Violation",
    "applies",
    "authorize",
    "bounded",
    "caller_refusal",
    "rate_denial",
    "read_authorization_policy",
    "read_policy_pack",
    "violations",
]
