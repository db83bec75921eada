"""Reading bodies: what is too deep, no JSON, or no such field."""

import json
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import UsageError
from jaxserve.serving.http.bodies import MAX_DEPTH, check_depth, parse, read
from jaxserve.serving.http.errors import FieldError


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    count: int = 0


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    inner: list[Inner] = []


JSON_VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | st.text('a"\\[]{}é', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("a[\\", max_size=3), inner),
    max_leaves=25,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(JSON_VALUES, st.integers(0, 6))
def test_the_depth_is_that_of_the_parsed_value(value: object, most: int) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    if depth_of(value) > most:
        with pytest.raises(UsageError, match=f"nests arrays and objects {depth_of(value)} deep"):
            check_depth(body, most)
    else:
        check_depth(body, most)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_usage_error(body: bytes) -> None:
    with suppress(UsageError):
        assert isinstance(parse(body), dict)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7"),
        (b'{"a": "\\ud800"}', "is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b'{"a": 1e999}', "number that cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number that cannot be read"),
        (b"[" * 100_000, "nests arrays and objects 100000 deep"),
        (b'{"a":' * (MAX_DEPTH + 1), f"nests arrays and objects {MAX_DEPTH + 1} deep"),
    ],
)
def test_what_cannot_be_parsed_is_explained(body: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(body)


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ('{"inner": []}', "name", "missing required field `name`"),
        ('{"name": 5}', "name", "name=5: Expected `str`, got `int`"),
        ('{"name": "a", "inner": [{"count": "x"}]}', "inner[0].count", "inner[0].count=x: Expect"),
        ('{"name": "a", "other": 1, "más": 2}', "other", "other, más: no such field; use name"),
        ('{"name": "a", "inner": [{"counts": 1}]}', "inner[0]", "unknown field `counts`"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(body: str, param: str, reason: str) -> None:
    with pytest.raises(FieldError) as caught:
        read(body.encode(), Asked)
    assert caught.value.param == param
    assert reason in str(caught.value)


def test_a_long_value_is_not_repeated_in_whole() -> None:
    with pytest.raises(FieldError) as caught:
        read(json.dumps({"name": ["x" * 10_000]}).encode(), Asked)
    assert len(str(caught.value)) < 200


def test_a_refused_field_may_ask_for_nothing() -> None:
    refused = {"tools": ([],)}
    for neutral in ("null", "[]"):
        assert read(b'{"name": "a", "tools": %s}' % neutral.encode(), Asked, refused).name == "a"
    with pytest.raises(FieldError, match="tools is not supported yet") as caught:
        read(b'{"name": "a", "tools": [1]}', Asked, refused)
    assert caught.value.code == "unsupported_parameter"
