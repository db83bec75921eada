"""Log lines for machines: one JSON object each, with the request they belong to.

set_up(as_json=True)
with request_id("4f1c…"):
log.info("request", extra={"prompt_tokens": 12})         # or {"fields": {...}}, for any names
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime"}
"""What every record has; the rest came with `extra`."""

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_KNOWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}


@contextmanager
def request_id(name: str) -> Iterator[None]:
    """Names the request that log lines of the block belong to."""
    token = _request_id.set(name)
    try:
        yield
    finally:
        _request_id.reset(token)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON.

    It has time, level, process, logger, message, request_id, and whatever came as `extra`.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = {name: value for name, value in vars(record).items() if name not in _USUAL}
        fields |= fields.pop("fields", {})
        name = fields.pop("request_id", None) or _request_id.get()
        if name is not None:
            line["request_id"] = name
        line |= fields
        if record.exc_info is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def set_up(as_json: bool, process: str = "server", level: int = logging.INFO) -> None:
    """Sends the log of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    if as_json:
        handler.setFormatter(JsonFormatter(process))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for noisy in ("jax", "absl", "orbax", "httpx", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
