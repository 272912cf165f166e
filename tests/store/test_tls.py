"""The vault's certificate: a stranger's is refused, one that the host trusts is taken."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vdiskfs.errors import NotFoundError, RefusedError
from vdiskfs.store import open_store


class _Absent(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response_only(404)
        self.send_header("x-ms-error-code", "BlobNotFound")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


class _Quiet(HTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust us leaves."""


def make_certificate(path: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stranger")])
    now = datetime.datetime.now(datetime.UTC)
    host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([host]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + certificate.public_bytes(pem))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    make_certificate(tmp_path / "stranger.pem")
    return tmp_path / "stranger.pem"


@pytest.fixture
def environ(certificate: Path) -> Iterator[dict[str, str]]:
    """Run a service with that certificate; give the environment that names it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = _Quiet(("127.0.0.1", 0), _Absent)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="tls service")
    thread.start()
    yield {
        "AZURE_STORAGE_KEY": "c2VjcmV0",
        "AZURE_STORAGE_BLOB_ENDPOINT": f"https://127.0.0.1:{server.server_address[1]}/acc",
    }
    server.shutdown()
    thread.join()
    server.server_close()


async def test_a_stranger_s_certificate_is_refused_at_once(environ: dict[str, str]) -> None:
    store = open_store("azure://vault", environ=environ)
    with pytest.raises(RefusedError, match="certificate is not trusted"):
        await store.stat("vault.json")
    assert store.requests == 1
    await store.aclose()


async def test_a_certificate_that_the_host_trusts_is_taken(
    environ: dict[str, str], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    store = open_store("azure://vault", environ=environ)
    with pytest.raises(NotFoundError):
        await store.stat("vault.json")
    await store.aclose()
