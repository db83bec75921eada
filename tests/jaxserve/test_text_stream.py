from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from jaxserve.text_stream import TextStream, decoder_spec, incomplete_suffix

# Tokens that mean something to one decoder or another: bytes of "é" and "€", stray bytes, "▁",
# word pieces, punctuation, byte-level names of bytes.
TOKEN = st.sampled_from(
    [
        *("<0xC3>", "<0xa9>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x41>", "<0x>", "<0xGG>"),
        *("▁", "▁▁", "▁a", "a▁b", " ", "  ", " a", "a", "##a", "##", ".", "n't", "'s", "do not"),
        *("Ã", "©", "âĤ", "¬", "ÿ", "Ġ", "é", "�", "北"),
    ]
)
STEP = st.sampled_from(
    [
        decoders.Replace("▁", " "),
        decoders.Replace("a", "bb"),
        decoders.Replace("##", ""),
        decoders.Replace(Regex("[.▁]+"), "-"),
        decoders.Strip(" ", 1, 0),
        decoders.Strip(" ", 3, 0),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.WordPiece(),
        decoders.WordPiece(cleanup=False),
        decoders.Fuse(),
        decoders.ByteFallback(),
        decoders.ByteLevel(),
    ]
)


def pieces(decoder: decoders.Decoder | None, tokens: Sequence[str]) -> list[str] | None:
    stream = TextStream.from_spec(decoder_spec(decoder))
    return stream and [*map(stream.push, tokens), stream.finish()]


@settings(max_examples=500)
@given(st.lists(STEP, min_size=1, max_size=5), st.lists(TOKEN, max_size=12))
def test_any_chain_of_steps_streams_what_the_library_decodes_at_once(
    steps: list[decoders.Decoder], tokens: list[str]
):
    decoder = decoders.Sequence(steps)
    streamed = pieces(decoder, tokens)
    assume(streamed is not None)
    assert streamed is not None
    assert "".join(streamed) == decoder.decode(tokens)


@given(st.lists(STEP, min_size=1, max_size=4), st.lists(TOKEN, max_size=8), st.lists(TOKEN))
def test_what_was_emitted_never_depends_on_what_comes(
    steps: list[decoders.Decoder], tokens: list[str], more: list[str]
):
    decoder = decoders.Sequence(steps)
    streamed = pieces(decoder, tokens)
    assume(streamed is not None)
    assert streamed is not None
    assert decoder.decode(tokens + more).startswith("".join(streamed[:-1]))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Strip(" ", 0, 1),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()]),
    ],
    ids=repr,
)
def test_a_decoder_without_an_exact_streaming_form_is_named_so(decoder: decoders.Decoder):
    assert TextStream.from_spec(decoder_spec(decoder)) is None


def test_byte_level_text_waits_only_for_the_bytes_of_its_character():
    # "€" is three bytes; FF begins no character; 28 ("(") cannot follow E2.
    assert pieces(decoders.ByteLevel(), ["a", "âĤ", "¬b", "ÿ", "â", "("]) == [
        *("a", "", "€b", "�", "", "�("),
        "",
    ]


def test_a_run_of_byte_tokens_waits_until_it_ends_or_breaks():
    decoder = decoders.ByteFallback()
    assert pieces(decoder, ["<0xC3>", "<0xA9>", "x"]) == ["", "", "éx", ""]
    assert pieces(decoder, ["<0xC3>", "<0xA9>", "<0xFF>", "<0x41>"]) == ["", "", "���", "�", ""]
    assert pieces(decoder, ["<0xC3>", "<0xA9>"]) == ["", "", "é"]
    assert pieces(decoder, ["<0xE2>", "<0x82>"]) == ["", "", "��"]


def test_the_first_space_is_stripped_once():
    decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert pieces(decoder, [" ", " a", " b"]) == ["", " a", " b", ""]


def test_resuming_keeps_the_first_space_and_completes_a_character():
    stream = TextStream.from_spec(
        decoder_spec(
            decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        )
    )
    assert stream is not None
    stream.resume(b"\xe2\x82")
    assert stream.push("<0xAC>") + stream.push(" a") == "€ a"


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (b"", b""),
        (b"abc", b""),
        ("€".encode(), b""),
        (b"a\xe2", b"\xe2"),
        (b"a\xe2\x82", b"\xe2\x82"),
        (b"\xf0\x9f\x98", b"\xf0\x9f\x98"),
        (b"\x82\xac", b""),
        (b"\xe2\x28", b""),
        (b"\xff", b""),
    ],
)
def test_incomplete_suffix_is_the_start_of_a_character(data: bytes, suffix: bytes):
    assert incomplete_suffix(data) == suffix
