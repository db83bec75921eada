"""What operators and their tools rely on: health, reflection, keys, certificates, definitions."""

import contextlib
import datetime
import ipaddress
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from jaxserve.client import Client, Retries, Tls
from jaxserve.errors import ConfigError, UnauthenticatedError, UnavailableError, UsageError
from jaxserve.serving.rpc.fake_server import FakeServer, fake_server
from jaxserve.serving.rpc.protos import __main__ as protos
from jaxserve.serving.rpc.protos import inference_pb2, open_inference_grpc_pb2
from jaxserve.serving.rpc.server import create_server, listen
from jaxserve.serving.server_options import ServerOptions

ONCE = Retries(1)
KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789"}
SERVICES = ("jaxserve.v1.Inference", "inference.GRPCInferenceService")
SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    return path


def health(channel: grpc.Channel, service: str, metadata: tuple[tuple[str, str], ...] = ()) -> int:
    """Returns the status that grpc_health_probe prints."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    request = health_pb2.HealthCheckRequest(service=service)
    return check(request, timeout=60, metadata=metadata).status


def test_health_tells_of_the_server_and_of_each_service(server: FakeServer):
    with grpc.insecure_channel(server.target) as channel:
        assert [health(channel, name) for name in ("", *SERVICES)] == [SERVING] * 3
        with pytest.raises(grpc.RpcError) as caught:
            health(channel, "nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_of_the_health_hears_of_every_change():
    with fake_server() as server, grpc.insecure_channel(server.target) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        unknown = watch(health_pb2.HealthCheckRequest(service="nothing"), timeout=60)
        assert next(unknown).status == UNKNOWN
        unknown.cancel()
        told = watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(told).status == SERVING
        server.loop.call_soon_threadsafe(server.service.drain)
        assert next(told).status == NOT_SERVING
        assert health(channel, "") == NOT_SERVING
        told.cancel()


def reflect(channel: grpc.Channel, version: str, **asked: Any) -> list[Any]:
    """Returns the answer to a question of grpcurl."""
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return list(ask(iter([reflection_pb2.ServerReflectionRequest(**asked)]), timeout=60))


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_services_and_describes_their_methods(server: FakeServer, version: str):
    with grpc.insecure_channel(server.target) as channel:
        (listed,) = reflect(channel, version, list_services="")
        names = {service.name for service in listed.list_services_response.service}
        assert {*SERVICES, "grpc.health.v1.Health"} <= names
        assert {f"grpc.reflection.{v}.ServerReflection" for v in ("v1", "v1alpha")} <= names
        (described,) = reflect(channel, version, file_containing_symbol=SERVICES[0])
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            for data in described.file_descriptor_response.file_descriptor_proto
        ]
        methods = {m.name for file in files for s in file.service for m in s.method}
        assert {"Generate", "Score", "GetLoad"} <= methods
        assert "google/protobuf/struct.proto" in {file.name for file in files}
        (missing,) = reflect(channel, version, file_containing_symbol="no.Such")
        assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_every_call_but_health_needs_a_key(key_file: Path):
    options = ServerOptions(grpc_port=0, api_key_file=key_file)
    with fake_server(options) as server, grpc.insecure_channel(server.target) as channel:
        assert health(channel, "") == SERVING
        paths = [
            f"/{service.full_name}/{method.name}"
            for service in (
                inference_pb2.DESCRIPTOR.services_by_name["Inference"],
                open_inference_grpc_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
            )
            for method in service.methods
        ]
        paths += [
            f"/grpc.reflection.{v}.ServerReflection/ServerReflectionInfo" for v in ("v1", "v1alpha")
        ]
        for path in paths:
            for metadata in ((), (("authorization", "Bearer wrong-key-0123456789"),)):
                with pytest.raises(grpc.RpcError) as caught:
                    list(channel.unary_stream(path)(b"", timeout=60, metadata=metadata))
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, path
        with Client(server.target, api_key=KEYS["alice"], retries=ONCE) as alice:
            assert alice.generate("abc", max_tokens=2).usage.output_tokens == 2
        with (
            Client(server.target, retries=ONCE) as nobody,
            pytest.raises(UnauthenticatedError, match="API key"),
        ):
            nobody.load()


def test_callers_neither_abort_nor_clash_with_nor_read_the_cache_of_each_other(key_file: Path):
    options = ServerOptions(grpc_port=0, api_key_file=key_file)
    with (
        fake_server(options, step_s=0.005) as server,
        Client(server.target, api_key=KEYS["alice"], retries=ONCE) as alice,
        Client(server.target, api_key=KEYS["bob"], retries=ONCE) as bob,
    ):
        stream = alice.stream("abc", max_tokens=60, ignore_eos=True, request_id="same")
        chunks = iter(stream)
        next(chunks)
        bob.abort("same", "alice/same")
        assert bob.generate("abc", max_tokens=2, request_id="same").usage.output_tokens == 2
        for _ in chunks:
            pass
        assert stream.completes[0].usage.output_tokens == 60
        prompt = "a prompt of more than one page, which the prefix cache keeps"
        alice.generate(prompt, max_tokens=1)
        assert alice.generate(prompt, max_tokens=1).usage.cached_tokens > 0
        assert bob.generate(prompt, max_tokens=1).usage.cached_tokens == 0


@dataclass(frozen=True)
class Authority:
    """Signs certificates, which it writes into a folder."""

    folder: Path
    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, folder: Path, name: str) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = _certificate(subject, subject, key.public_key(), True).sign(
            key, hashes.SHA256()
        )
        made = cls(folder, name, key, certificate)
        made.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return made

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Returns the files of a certificate and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = _certificate(subject, self.certificate.subject, key.public_key(), False).sign(
            self.key, hashes.SHA256()
        )
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, authority: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )


def test_connections_are_encrypted_and_clients_must_be_signed(tmp_path: Path):
    ours, theirs = (Authority.create(tmp_path, name) for name in ("ours", "theirs"))
    cert, key = ours.issue("server")
    options = ServerOptions(grpc_port=0, tls_cert=cert, tls_key=key, tls_client_ca=ours.file)
    signed, foreign = Tls(ours.file, *ours.issue("one")), Tls(ours.file, *theirs.issue("two"))
    with fake_server(options) as server:
        with Client(server.target, tls=signed, timeout_s=60) as client:
            assert client.generate("abc", max_tokens=2).usage.output_tokens == 2
        for tls in (Tls(ours.file), foreign, Tls(theirs.file, *ours.issue("three")), False):
            with (
                Client(server.target, tls=tls, retries=ONCE, timeout_s=60) as client,
                pytest.raises(UnavailableError),
            ):
                client.load()


def test_without_client_certificates_the_server_alone_shows_one(tmp_path: Path):
    ours = Authority.create(tmp_path, "ours")
    cert, key = ours.issue("server")
    options = ServerOptions(grpc_port=0, tls_cert=cert, tls_key=key)
    with (
        fake_server(options) as server,
        Client(server.target, tls=Tls(ours.file), timeout_s=60) as client,
    ):
        assert client.load().running == 0


def test_plaintext_stays_on_this_machine_unless_asked_for():
    with pytest.raises(UsageError, match="allow_plaintext"):
        ServerOptions(host="0.0.0.0", grpc_port=0)
    ServerOptions(host="0.0.0.0", grpc_port=0, allow_plaintext=True)


def in_loop(work: Callable[[], object]) -> None:
    """Runs work in a loop of its own thread, as gRPC wants it."""
    import asyncio

    async def run() -> None:
        work()

    failed: list[BaseException] = []

    def thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)

    running = threading.Thread(target=thread)
    running.start()
    running.join()
    if failed:
        raise failed[0]


def test_a_port_that_is_taken_is_an_error(server: FakeServer):
    options = ServerOptions(grpc_port=server.port)
    with pytest.raises(UnavailableError, match="cannot listen"):
        in_loop(lambda: listen(create_server(server.service, options), options))


def test_files_that_cannot_be_read_are_errors_for_the_operator(server: FakeServer, tmp_path: Path):
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="API key file"):
        in_loop(lambda: create_server(server.service, ServerOptions(api_key_file=missing)))
    options = ServerOptions(grpc_port=0, tls_cert=missing, tls_key=missing)
    with pytest.raises(ConfigError, match="certificate"):
        in_loop(lambda: listen(create_server(server.service, options), options))


def test_the_committed_modules_are_those_of_the_definitions(tmp_path: Path):
    pytest.importorskip("grpc_tools", reason="makes the modules; extra dev")
    described = descriptor_pb2.FileDescriptorSet.FromString(protos.compile_into(tmp_path))
    compiled = {file.name: file for file in described.file}
    for module in (inference_pb2, open_inference_grpc_pb2):
        committed = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(committed)
        expected = compiled[committed.name]
        for message in _messages(expected):
            for field in message.field:
                field.ClearField("json_name")  # which only compilers write
        assert committed == expected, f"run python -m {protos.__package__}"


def _messages(
    parent: descriptor_pb2.FileDescriptorProto | descriptor_pb2.DescriptorProto,
) -> Iterator[descriptor_pb2.DescriptorProto]:
    """Yields the messages of a file, those within messages too."""
    file = isinstance(parent, descriptor_pb2.FileDescriptorProto)
    for message in parent.message_type if file else parent.nested_type:
        yield message
        yield from _messages(message)


def test_generated_modules_do_not_ask_for_a_version_of_protobuf():
    for path in protos.FOLDER.glob("*_pb2.py"):
        assert "runtime_version" not in path.read_text()


def frame(kind: int, payload: bytes = b"", stream: int = 0) -> bytes:
    """Returns a frame of HTTP/2."""
    return (
        struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + struct.pack(">I", stream) + payload
    )


@pytest.mark.parametrize(
    ("noise", "answer"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", b"", id="HTTP/1"),
        pytest.param(bytes(range(256)) * 64, b"", id="bytes"),
        pytest.param(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4) + frame(6, bytes(8)) * 8,
            b"too_many_pings",
            id="a flood of pings",
        ),
    ],
)
def test_noise_on_the_port_ends_its_connection_alone(
    server: FakeServer, noise: bytes, answer: bytes
):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(noise)
        said = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                said += data
    assert answer in said
    with grpc.insecure_channel(server.target) as channel:
        assert health(channel, "") == SERVING


@pytest.mark.parametrize("asked", [False, True])
def test_the_log_names_calls_and_tells_prompts_only_where_asked_to(
    asked: bool, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "jaxserve.serving.rpc")
    options = ServerOptions(grpc_port=0, log_prompts=asked)
    with fake_server(options) as server, Client(server.target) as client:
        client.generate("a secret", max_tokens=1, request_id="mine")
        with pytest.raises(UsageError):
            client.generate("a secret", n=0, request_id="wrong")
    first, second = [record for record in caplog.records if "Generate" in record.getMessage()]
    assert (first.request_id, first.status) == ("mine", "OK")  # pyright: ignore
    assert (second.request_id, second.status) == ("wrong", "INVALID_ARGUMENT")  # pyright: ignore
    assert ("a secret" in str(vars(first))) is asked
