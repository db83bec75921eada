"""Log lines as machines read them."""

import json
import logging
import sys

from jaxserve.serving.logs import JsonFormatter, request_id


def line(message: str, *args: object, **extra: object) -> dict[str, object]:
    """Returns the JSON object of a record."""
    logger = logging.Logger("jaxserve.test")
    record = logger.makeRecord(
        logger.name, logging.INFO, __file__, 1, message, args, sys.exc_info(), extra=extra
    )
    return json.loads(JsonFormatter("server").format(record))


def test_everything_given_as_extra_is_a_field_of_the_line():
    told = line("GET %s", "/v1/models", request_id="r1", status=200, seconds=0.5)
    assert told["message"] == "GET /v1/models"
    assert (told["request_id"], told["status"], told["seconds"]) == ("r1", 200, 0.5)


def test_fields_may_have_names_that_records_use_themselves():
    assert line("hi", fields={"name": "tiny", "request_id": "r2"})["name"] == "tiny"


def test_nothing_else_of_a_record_is_told():
    assert set(line("hi")) <= {"time", "level", "process", "logger", "message", "exception"}


def test_the_request_at_hand_is_named():
    with request_id("r3"):
        assert line("hi")["request_id"] == "r3"
    assert "request_id" not in line("hi")
