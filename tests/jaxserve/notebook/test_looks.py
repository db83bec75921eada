"""What a notebook shows: text and HTML, escaped, without the numbers of weights."""

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import UsageError
from jaxserve.notebook import Activations, AttentionView, Card, Score, TokenView
from jaxserve.notebook.activations import check_size
from jaxserve.notebook.html import image

NASTY = "<script>alert('x')</script>&\"\n"


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Balanced:
    """Returns what a page holds, of which nothing is foreign."""
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.tags
    assert not any(name.startswith("on") for name, _ in parser.attributes)
    return parser


VIEW = TokenView(
    ("def", NASTY, "\tx"), (None, -0.1, -30.0), ((), ((NASTY, -0.1), (" y", -2.0)), ())
)
PROBS = np.tril(np.ones((2, 3, 3), np.float32)) / np.arange(1, 4)[None, :, None]


@pytest.mark.parametrize(
    "shown",
    [
        VIEW,
        Score((1, 2, 3), VIEW.logprobs, VIEW),
        AttentionView(PROBS, (NASTY, "b", "c"), NASTY),
        AttentionView(PROBS[:1], (NASTY, "b", "c"), NASTY),
        Activations({NASTY: jnp.ones((2, 3))}),
        Card(NASTY, ((NASTY, NASTY),), ((NASTY, 5), ("b", 7)), 20, "<svg></svg>"),
    ],
    ids=lambda shown: type(shown).__name__,
)
def test_everything_is_escaped_and_follows_the_colours_of_the_page(shown: object) -> None:
    page = shown._repr_html_()  # type: ignore[attr-defined]
    read(page)
    # No colour of text and no ground of its own: both are the page's, light or dark.
    assert not re.search(r"[;\"{]color:(?!inherit)", page)
    assert not re.search(r"background:(white|black|#fff|#000)", page)
    assert len(repr(shown)) < 2000


def test_the_less_likely_a_token_the_stronger_its_colour() -> None:
    page = VIEW.html()
    strengths = [float(x) for x in re.findall(r"rgba\(234,88,12,([\d.]+)\)", page)]
    assert strengths == [0.0, 0.01, 0.6]
    titles = [value for name, value in read(page).attributes if name == "title" and value]
    assert titles[0] == "'def': first"
    assert titles[1].splitlines()[0].endswith(": 90.48% (-0.100)")
    assert titles[1].splitlines()[2] == "' y': 13.53%"
    assert "⏎\n" in page and "⇥" in page
    assert repr(VIEW).splitlines()[2].split() == ["'\\tx'", "-30.000"]


def test_a_score_is_the_sum_of_its_tokens() -> None:
    score = Score((1, 2, 3), (None, -1.0, -3.0), VIEW)
    assert score.total == -4.0
    assert score.perplexity == pytest.approx(np.exp(2.0))
    assert np.isnan(Score((1,), (None,), VIEW).perplexity)


def test_a_picture_has_the_strength_of_the_numbers() -> None:
    alpha = np.array([[0, 128, 255], [7, 8, 9]], np.uint8)
    data = base64.b64decode(image(alpha).partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    (size,) = struct.unpack(">I", data[33:37])
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(2, 13)
    assert not rows[:, 0].any()
    np.testing.assert_array_equal(rows[:, 1:].reshape(2, 3, 4)[..., 3], alpha)


def test_attention_is_told_in_words_and_drawn_head_by_head() -> None:
    view = AttentionView(PROBS, ("a", "b", "c"), "layer 1")
    assert "head 1: 0.5 tokens back" in repr(view)
    assert read(view._repr_html_()).tags.count("img") == 2
    assert read(AttentionView(PROBS[:1], ("a", "b", "c"))._repr_html_()).tags.count("img") == 1
    with pytest.raises(UsageError, match=r"expected \[heads, 2, 2\]"):
        AttentionView(PROBS, ("a", "b"))
    many = np.zeros((1, 513, 513), np.float32)
    with pytest.raises(UsageError, match="513 tokens are too many for a picture of at most 512"):
        AttentionView(many, ("a",) * 513)


def test_activations_are_a_tree_and_show_no_numbers() -> None:
    found = Activations({"z": jnp.full((2, 3), 7.5), "a": jnp.ones(4, jnp.bfloat16)})
    assert found.nbytes == 32
    assert "7.5" not in repr(found) + found._repr_html_()
    assert repr(found).splitlines()[-1] == "2 activations, 32 B"
    doubled = jax.jit(lambda x: jax.tree.map(lambda a: 2 * a, x))(found)
    assert isinstance(doubled, Activations) and list(doubled) == ["z", "a"]
    check_size(found, 32)
    with pytest.raises(UsageError, match=r"takes 32 B \(of 2 activations, z alone 24 B\)"):
        check_size(found, 31)


def test_the_bar_is_the_share_of_the_device() -> None:
    page = Card("t", (), (("weights", 25), ("cache", 50)), 100)._repr_html_()
    assert re.findall(r"width:([\d.]+)%", page) == ["25.00", "50.00"]
    assert "75 B of 100 B on each device" in page
