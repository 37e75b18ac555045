"""Formations: a tree of members with one coordinator, as a document, as a status, and as events."""

from cellos.core.formation.documents import Formation, document_has_specs, parse_formation, read_formation
from cellos.core.formation.members import DEFAULT_POOL, Member, cell_id
from cellos.core.formation.narrowing import PLATFORM_LIMITS
from cellos.core.formation.transitions import (
    PHASES,
    STATUSES,
    TERMINAL,
    TRANSITIONS,
    FormationStatus,
    Phase,
    next_status,
    phase_of_request,
    status_of,
)

__all__ = [
    "DEFAULT_POOL",
    "PHASES",
    "PLATFORM_LIMITS",
    "STATUSES",
    "TERMINAL",
    "TRANSITIONS",
    "Formation",
    "FormationStatus",
    "Member",
    "Phase",
    "cell_id",
    "document_has_specs",
    "next_status",
    "parse_formation",
    "phase_of_request",
    "read_formation",
    "status_of",
]
