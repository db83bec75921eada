"""What operators may set, what is refused, and what stands at the entrance."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from jaxserve import errors
from jaxserve.errors import QueueFullError, TooLargeError, UsageError
from jaxserve.serving import logs
from jaxserve.serving.gate import Gate
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.status import INTERNAL_MESSAGE, public_message, status_of
from jaxserve.serving.supervisor import Backoff

PEM = Path("a.pem")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "0.0.0.0"}, "travel unencrypted"),
        ({"host": "::"}, "travel unencrypted"),
        ({"host": "example.org"}, "travel unencrypted"),
        ({"tls_cert": PEM}, "belong together"),
        ({"tls_client_ca": PEM}, "needs tls_cert"),
        ({"http_port": 70000}, "http_port=70000 is no port"),
        ({"max_n": 0}, "max_n=0 is out of range"),
        ({"max_logprobs": 21}, "from 1 to 20"),
        ({"max_requests": 0}, "max_requests=0"),
        ({"cors_origins": ("*",)}, "name the origins"),
        ({"drain_grace_s": -1}, "must not be below 0"),
        ({"request_timeout_s": 0.0}, "must be above 0"),
    ],
)
def test_options_that_make_no_sense_or_no_safety_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ServerOptions(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"host": "localhost"},
        {"host": "127.8.0.1"},
        {"host": "::1"},
        {"host": "0.0.0.0", "allow_plaintext": True},
        {"host": "0.0.0.0", "tls_cert": PEM, "tls_key": PEM},
    ],
)
def test_options_that_are_safe_are_taken(fields: dict[str, Any]) -> None:
    ServerOptions(**fields)


def test_the_gate_counts_requests_and_bytes() -> None:
    gate = Gate(max_requests=2, max_bytes=100, max_body_bytes=60)
    with gate.enter(60):
        with pytest.raises(QueueFullError, match="41 more exceed the limit of 100"):
            gate.enter(41).__enter__()
        with pytest.raises(TooLargeError, match="61 bytes and the limit is 60"):
            gate.enter(61).__enter__()
        with gate.enter(40), pytest.raises(QueueFullError, match="2 requests are under way"):
            gate.enter().__enter__()
        assert (gate.requests, gate.num_bytes) == (1, 60)
    assert (gate.requests, gate.num_bytes, gate.refused) == (0, 0, 3)


def test_every_error_has_a_status_and_none_from_elsewhere_its_words() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) > 12
    for kind in kinds:
        status = status_of(kind("words"))
        assert 400 <= status.http < 600
        internal = status.http == 500
        assert public_message(kind("words")) == (INTERNAL_MESSAGE if internal else "words")
    assert status_of(errors.CapacityError("x")).grpc == "OUT_OF_RANGE"
    assert status_of(errors.QueueFullError("x")).http == 429
    assert public_message(OSError("/srv/someone")) == INTERNAL_MESSAGE


def test_waits_before_restarts_double_up_to_a_limit() -> None:
    backoff = Backoff(first_s=0.5, most_s=3.0)
    assert [backoff.wait_s(failures) for failures in (1, 2, 3, 4, 50)] == [0.5, 1, 2, 3, 3]


def test_a_log_line_is_one_json_object_with_its_request() -> None:
    formatter = logs.JsonFormatter("server")
    record = logging.makeLogRecord({"msg": "%s\nnot two lines", "args": ("one",), "tokens": 3})
    with logs.request_id("r1"):
        text = formatter.format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "one\nnot two lines"
    assert (line["request_id"], line["tokens"], line["process"]) == ("r1", 3, "server")
    assert "request_id" not in json.loads(formatter.format(record))
