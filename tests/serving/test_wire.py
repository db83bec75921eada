"""Frames between server and engine, whole, in pieces and damaged."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import errors
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.layout_file import Buckets, Dtypes, Layout
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.serving.engine import StoppedError
from jaxserve.serving.metrics import Histogram, MetricsSnapshot
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Request, RequestTimes, SamplingParams, TokenEvent, TokenLogprob
from jaxserve.serving.wire import (
    FROM_ENGINE,
    FROM_SERVER,
    MAX_FRAME_BYTES,
    Abort,
    Beat,
    Events,
    Finish,
    FrameReader,
    Ready,
    Refused,
    Start,
    Stop,
    Submit,
    WireError,
    error_fields,
    error_of,
    frame,
)

PARAMS = SamplingParams(
    n=2, temperature=0.5, seed=-3, max_tokens=9, stop=("é", "\n"), logit_bias={5: -1.5}
)
LAYOUT = Layout(
    model="0123456789abcdef",
    mesh=MeshPlan(2, 2, 2),
    prefill=PhaseLayout(Ffn.WG_XY, Heads.BATCH),
    decode=PhaseLayout(Ffn.WS2D, Heads.BATCH),
    dtypes=Dtypes("bfloat16", "bfloat16", "bfloat16"),
    buckets=Buckets(8, 64),
)
FROM_SERVER_MESSAGES = [
    Start("tiny", "float32", "xla", EngineOptions(max_sequences=3), False, 1.5),
    Start("tiny", layout=LAYOUT, devices="cpu:8"),
    Submit(Request(id="r", prompt=(1, 2, 3), params=PARAMS, bad_word_ids=((1, 2),), salt="s")),
    Abort("r"),
    Finish("r", 1, 7),
    Stop(),
]
LOGPROB = TokenLogprob(4, -0.5, ((4, -0.5), (2, -1.25)))
HISTOGRAM = Histogram((1.0, 2.0))
FROM_ENGINE_MESSAGES = [
    Events(
        [
            TokenEvent("r", 0, (4,), cached_tokens=2),
            TokenEvent("r", 1, (4,), "stop", (LOGPROB,), 2, None, True, (None, LOGPROB)),
            TokenEvent("s", 0, finish_reason="error", error="x", times=RequestTimes(1.0, 2.0)),
        ]
    ),
    Refused("r", "QueueFullError", "full", 2.5),
    Ready({"versions": {"jax": "1"}, "devices": ["cpu"]}, {"weights": 0.5}),
    Beat(0.0, 5.0, MetricsSnapshot(gauges={}, counters={}, histograms={"h": HISTOGRAM.snapshot()})),
]


@given(st.lists(st.integers(0, 400), max_size=12))
def test_messages_arrive_however_the_stream_is_cut(cuts: list[int]) -> None:
    sides: list[tuple[Any, list[Any]]] = [
        (FROM_SERVER, FROM_SERVER_MESSAGES),
        (FROM_ENGINE, FROM_ENGINE_MESSAGES),
    ]
    for decoder, messages in sides:
        data = b"".join(map(frame, messages))
        places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
        reader = FrameReader(decoder)
        found = [
            message for start, end in pairwise(places) for message in reader.feed(data[start:end])
        ]
        assert found == messages


@given(st.binary(max_size=200))
def test_garbage_is_an_error_or_waits_for_more(data: bytes) -> None:
    reader = FrameReader(FROM_SERVER)
    try:
        messages = reader.feed(data)
    except WireError:
        return
    assert all(isinstance(message, msgspec.Struct) for message in messages)


def test_a_frame_of_no_end_is_refused_by_its_length() -> None:
    reader = FrameReader(FROM_SERVER)
    with pytest.raises(WireError, match="the limit is"):
        reader.feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


def test_a_message_of_the_other_side_is_refused() -> None:
    with pytest.raises(WireError, match="no message"):
        FrameReader(FROM_SERVER).feed(frame(Refused("r", "a", "b")))


@pytest.mark.parametrize(
    "error",
    [
        errors.QueueFullError("full", 7.0),
        errors.CapacityError("too long"),
        errors.UnavailableError("stops", 3.0),
        errors.UsageError("bad"),
    ],
)
def test_errors_keep_their_type_and_words(error: errors.JaxserveError) -> None:
    found = error_of(*error_fields(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_an_error_from_elsewhere_loses_its_words_and_a_private_type_its_name() -> None:
    found = error_of(*error_fields(OSError("/srv/someone/secret")))
    assert type(found) is errors.GenerationError
    assert "secret" not in str(found)
    assert type(error_of(*error_fields(StoppedError("stopped")))) is errors.UnavailableError
    assert type(error_of("SystemExit", "x")) is errors.GenerationError
    assert type(error_of("annotations", "x")) is errors.GenerationError
