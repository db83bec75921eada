"""HTTP under TLS: encrypted, and with a client authority only for those that it signed."""

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jaxserve.serving.fake_service import fake_service
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.server_options import ServerOptions

OPTIONS = ServerOptions(model_name="fake")
POST = {"prompt": "hi", "max_tokens": 3, "stream": True}


def certify(folder: Path, name: str) -> tuple[Path, Path]:
    """Returns the files of a certificate that signs itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now, hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - hour)
        .not_valid_after(now + hour)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(key.private_bytes(pem, *private))
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: certify(folder, name) for name in ("server", "client", "stranger")}


@pytest.fixture(params=[False, True], ids=["tls", "mtls"])
def server(
    request: pytest.FixtureRequest, files: dict[str, tuple[Path, Path]]
) -> Iterator[BackgroundServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files["server"])
    if request.param:
        context.load_verify_locations(files["client"][0])
        context.verify_mode = ssl.CERT_REQUIRED
    with serve_in_background(fake_service, OPTIONS, tls=context) as server:
        yield server


def trusting(files: dict[str, tuple[Path, Path]], name: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files["server"][0])
    if name is not None:
        context.load_cert_chain(*files[name])
    return context


def test_a_stream_comes_over_tls(
    server: BackgroundServer, files: dict[str, tuple[Path, Path]]
) -> None:
    assert server.url.startswith("https://")
    with httpx.Client(verify=trusting(files, "client"), base_url=server.url) as client:
        response = client.post("/v1/completions", json=POST)
        assert response.text.endswith("data: [DONE]\n\n")
        assert client.get("/health").status_code == 200


def test_who_does_not_fit_is_turned_away(
    server: BackgroundServer, files: dict[str, tuple[Path, Path]], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(server.url + "/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health")
    if "mtls" in request.node.name:
        for name in (None, "stranger"):
            with pytest.raises(httpx.TransportError):
                httpx.get(server.url + "/health", verify=trusting(files, name))
