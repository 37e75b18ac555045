"""What tests with real servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.testing.nats_server import NatsServer


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and server.pem with server.key that it signed for 127.0.0.1."""
    import datetime as dt
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    directory = tmp_path_factory.mktemp("certificates")
    now = dt.datetime.now(dt.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(name: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
        )

    def signed(plain: x509.CertificateBuilder, *extensions: tuple[x509.ExtensionType, bool]) -> bytes:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())  # strict verification asks for it
        for extension, critical in (*extensions, (issuer, False)):
            plain = plain.add_extension(extension, critical=critical)
        return plain.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    signs = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage = x509.KeyUsage(**signs, key_cert_sign=True, crl_sign=True)
    own = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    authority = builder("test authority", ca_key.public_key())
    basic = x509.BasicConstraints(ca=True, path_length=None)
    (directory / "ca.pem").write_bytes(signed(authority, (basic, True), (usage, True), (own, False)))
    (directory / "server.pem").write_bytes(signed(builder("server", key.public_key()), (names, False)))
    pem, pkcs8, clear = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "server.key").write_bytes(key.private_bytes(pem, pkcs8, clear))
    return directory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of the test's own, without any stream."""
    with NatsServer(str(tmp_path / "nats")) as started:
        yield started


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Servers with settings of their own."""
    started: list[NatsServer] = []

    def make(settings: str = "", **options: Any) -> NatsServer:
        server = NatsServer(str(tmp_path / f"nats-{len(started)}"), settings=settings, **options)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.stop()
