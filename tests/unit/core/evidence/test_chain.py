import hashlib

import pytest

from cellos.core.events import DESTROYED, STARTED, Event, canonical_bytes
from cellos.core.evidence.chain import Chain, digest, genesis
from cellos.errors import EvidenceError

SPEC_HASH, NONCE = "ab" * 32, "cd" * 32


def event(data: object, kind: str = STARTED) -> Event:
    return Event(id="id", source="test", type=kind, data=data)


def test_genesis() -> None:
    text = f"cellos-chain-v1\nrun-1\n{SPEC_HASH}\n{NONCE}"
    assert genesis("run-1", SPEC_HASH, NONCE) == hashlib.sha256(text.encode()).hexdigest()


def test_links_of_a_run() -> None:
    chain = Chain.first("run-1", SPEC_HASH, NONCE)
    first = chain.link({"a": 1})
    assert first == {"a": 1, "chain": {"seq": 0, "prev": genesis("run-1", SPEC_HASH, NONCE), "nonce": NONCE}}
    line = canonical_bytes(event(first))
    chain.advance(line)
    assert chain.link({}) == {"chain": {"seq": 1, "prev": hashlib.sha256(line).hexdigest()}}
    assert chain.link({}, final=True)["chain"]["count"] == 2


def test_link_changes_nothing_until_the_event_is_final() -> None:
    chain = Chain.first("run-1", SPEC_HASH, NONCE)
    data = {"a": 1}
    assert chain.link(data) == chain.link(data)
    assert data == {"a": 1}


def test_a_run_of_one_event() -> None:
    link = Chain.first("run-1", SPEC_HASH, NONCE).link({}, final=True)["chain"]
    assert (link["seq"], link["count"], link["nonce"]) == (0, 1, NONCE)


def test_resumed_and_after_are_the_chain_that_was_left() -> None:
    chain = Chain.first("run-1", SPEC_HASH, NONCE)
    line = canonical_bytes(event(chain.link({})))
    chain.advance(line)
    for other in (Chain.after(line), Chain.resumed(1, digest(line))):
        assert other.link({"x": 1}, final=True) == chain.link({"x": 1}, final=True)


def test_after_a_signed_event_the_event_itself_counts() -> None:
    chain = Chain.first("run-1", SPEC_HASH, NONCE)
    inner = event(chain.link({}), DESTROYED)
    envelope = {"event": inner, "signerKid": "k", "algorithm": "ed25519", "signature": "s"}
    wrapper = Event(id="id", source="test", type="dev.cellos.events.signed_envelope.v1", data=envelope)
    assert Chain.after(canonical_bytes(wrapper)).prev == digest(canonical_bytes(inner))


@pytest.mark.parametrize("data", [None, {}, {"chain": 1}, {"chain": {}}, {"chain": {"seq": "1"}}, {"chain": {"seq": True}}])
def test_nothing_follows_an_event_without_a_chain(data: object) -> None:
    with pytest.raises(EvidenceError, match="carries no chain"):
        Chain.after(canonical_bytes(event(data)))
