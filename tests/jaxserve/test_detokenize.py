import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from jaxserve.detokenize import IncrementalDetokenizer
from jaxserve.errors import UsageError
from jaxserve.text_stream import TextStream
from jaxserve.tokenizer import Tokenizer
from jaxserve.tokenizer_config import TokenizerConfig

TokenizerOf = Callable[[str], Tokenizer]

# Taken modulo the vocabulary and a few numbers beyond it, which have no token.
NUMBERS = st.lists(st.integers(0, 2**16), max_size=24)
# The byte tokens of the SentencePiece styles are 3..258: mostly invalid UTF-8, sometimes valid.
BYTES = st.lists(
    st.one_of(
        st.binary(max_size=3).map(list),
        st.text(max_size=3).map(lambda text: list(text.encode())),
    ),
    max_size=6,
).map(lambda chunks: [3 + byte for chunk in chunks for byte in chunk])


def pieces(detokenizer: IncrementalDetokenizer, ids: Iterable[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.finish()]


def ends_in_byte(tokenizer: Tokenizer, ids: list[int]) -> bool:
    tokens = [tokenizer.token(i) for i in ids if not tokenizer.is_special(i)]
    return next((t for t in reversed(tokens) if t is not None), "").startswith("<0x")


def ids_of(tokenizer: Tokenizer, numbers: list[int]) -> list[int]:
    return [number % (tokenizer.vocab_size + 3) for number in numbers]


@given(NUMBERS, st.booleans())
def test_pieces_add_up_to_decoding_at_once(tokenizer: Tokenizer, numbers: list[int], skip: bool):
    ids = ids_of(tokenizer, numbers)
    streamed = pieces(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(streamed) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("style", ["llama_2", "gemma"])
@given(ids=st.lists(st.one_of(BYTES, NUMBERS), max_size=4).map(lambda parts: [*chain(*parts)]))
def test_runs_of_byte_tokens_add_up_to_decoding_at_once(
    tokenizer_of: TokenizerOf, style: str, ids: list[int]
):
    tokenizer = tokenizer_of(style)
    ids = ids_of(tokenizer, ids)
    assert "".join(pieces(IncrementalDetokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@given(st.lists(st.binary(max_size=12), max_size=6))
def test_random_bytes_add_up_to_decoding_at_once(tokenizer_of: TokenizerOf, chunks: list[bytes]):
    tokenizer = tokenizer_of("byte_level")
    id_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    data = b"".join(chunks)
    ids = [id_of[bytes([byte])] for byte in data]
    streamed = pieces(IncrementalDetokenizer(tokenizer), ids)
    assert "".join(streamed) == tokenizer.decode(ids) == data.decode(errors="replace")


@given(st.text(max_size=30), st.text(max_size=30))
def test_complete_characters_do_not_wait_for_the_end(
    tokenizer_of: TokenizerOf, prompt: str, text: str
):
    assume("é" not in prompt + text)  # the added token "é" decodes to the byte that it names
    tokenizer = tokenizer_of("byte_level")
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = pieces(IncrementalDetokenizer(tokenizer, prompt_ids), ids)
    assert "".join(streamed) == text
    assert streamed[-1] == ""


@given(NUMBERS, NUMBERS)
@example([5], [6])
def test_after_a_prompt_comes_what_the_tokens_add_to_it(
    tokenizer: Tokenizer, prompt: list[int], numbers: list[int]
):
    prompt, ids = ids_of(tokenizer, prompt), ids_of(tokenizer, numbers)
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    assume("�" not in before and whole.startswith(before))
    # Bytes of the prompt and of the tokens may make one broken run: then they are apart.
    assume("�" not in whole or not ends_in_byte(tokenizer, prompt))
    streamed = pieces(IncrementalDetokenizer(tokenizer, prompt), ids)
    assert "".join(streamed) == whole[len(before) :]


def test_the_first_space_is_kept_after_a_prompt_only(tokenizer_of: TokenizerOf):
    tokenizer = tokenizer_of("llama_2")
    bos, ids = tokenizer.encode("the dog")[0], tokenizer.encode("the dog")[1:]
    assert "".join(pieces(IncrementalDetokenizer(tokenizer), ids)) == "the dog"
    assert "".join(pieces(IncrementalDetokenizer(tokenizer, [bos]), ids)) == "the dog"
    prompt = tokenizer.encode("over")
    assert "".join(pieces(IncrementalDetokenizer(tokenizer, prompt), ids)) == " the dog"


@pytest.mark.parametrize("style", ["llama_2", "gemma", "byte_level"])
def test_a_character_that_the_prompt_begins_is_emitted_whole(tokenizer_of: TokenizerOf, style: str):
    tokenizer = tokenizer_of(style)
    id_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    first, second, third = (id_of[bytes([byte])] for byte in "€".encode())
    detokenizer = IncrementalDetokenizer(tokenizer, [*tokenizer.encode("a"), first, second])
    assert "".join(pieces(detokenizer, [third])) == "€"


def test_a_complete_character_at_the_end_of_the_prompt_is_not_repeated(tokenizer_of: TokenizerOf):
    tokenizer = tokenizer_of("llama_2")
    prompt = tokenizer.encode("I like 🦙")
    assert prompt[-4:] == [3 + byte for byte in "🦙".encode()]
    ids = tokenizer.encode("and dog")[1:]
    assert "".join(pieces(IncrementalDetokenizer(tokenizer, prompt), ids)) == " and dog"


def test_special_tokens_are_left_out_when_asked(tokenizer_of: TokenizerOf):
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    assert "".join(pieces(IncrementalDetokenizer(tokenizer), ids)) == "ab"
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(pieces(shown, ids)) == "a<|im_end|>b"


def test_skipped_tokens_do_not_break_a_character(tokenizer_of: TokenizerOf):
    tokenizer = tokenizer_of("byte_level")
    id_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    first, second = (id_of[bytes([byte])] for byte in "é".encode())
    special = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    streamed = pieces(IncrementalDetokenizer(tokenizer), [first, *special, second])
    assert streamed == ["", "", "é", ""]


class OpaqueBackend:
    """A backend of which only `decode` is known; its token ids are the numbers of characters."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._decode(ids)

    def token(self, token_id: int) -> str | None:
        return chr(token_id)

    def token_id(self, token: str) -> int | None:
        return ord(token)

    def text_stream(self) -> TextStream | None:
        return None

    def vocab_size(self) -> int:
        return 256

    def special_ids(self) -> frozenset[int]:
        return frozenset()


def opaque_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def joined_words(ids: Sequence[int]) -> str:
    """Returns words made of pieces; a capital stands for a piece that is not a word's last."""
    pieces = (char.lower() + "@@" if char.isupper() else char for char in map(chr, ids))
    return " ".join(pieces).replace("@@ ", "")


def opaque(decode: Callable[[Sequence[int]], str]) -> Tokenizer:
    return Tokenizer(OpaqueBackend(decode), TokenizerConfig(special_tokens={}))


@given(st.lists(st.one_of(st.binary(max_size=30), st.text(max_size=20).map(str.encode))))
def test_an_unknown_decoder_of_bytes_adds_up(chunks: list[bytes]):
    data = b"".join(chunks)
    streamed = pieces(IncrementalDetokenizer(opaque(opaque_bytes)), data)
    assert "".join(streamed) == data.decode(errors="replace")


@given(st.text("abAB", max_size=60), st.text("abAB", max_size=20))
def test_an_unknown_decoder_that_changes_its_last_token_adds_up(text: str, prompt: str):
    ids, before = [*map(ord, text)], [*map(ord, prompt)]
    streamed = pieces(IncrementalDetokenizer(opaque(joined_words)), ids)
    assert "".join(streamed) == joined_words(ids)
    streamed = pieces(IncrementalDetokenizer(opaque(joined_words), before), ids)
    assert joined_words([*before, *ids]).endswith("".join(streamed))


def test_an_unknown_decoder_holds_a_bounded_text():
    detokenizer = IncrementalDetokenizer(opaque(opaque_bytes))
    emitted = "".join(detokenizer.push(0xFF) for _ in range(1000))
    assert 1000 - 64 <= len(emitted) <= 1000
    assert emitted + detokenizer.finish() == "�" * 1000


@pytest.mark.parametrize("style", ["byte_level", "llama_2", "opaque"])
def test_a_push_costs_the_same_however_long_the_text(tokenizer_of: TokenizerOf, style: str):
    tokenizer = tokenizer_of(style)
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog ", add_special_tokens=False)

    def thousand_s() -> float:
        start = time.perf_counter()
        for number in range(1000):
            detokenizer.push(ids[number % len(ids)])
        return time.perf_counter() - start

    times_s = [thousand_s() for _ in range(20)]
    # A quadratic scheme would be tens of times slower at the end; the minimum ignores pauses.
    assert min(times_s[-5:]) < 3 * min(times_s[:5])


def test_a_negative_id_is_refused(tokenizer_of: TokenizerOf):
    with pytest.raises(UsageError, match="-1"):
        IncrementalDetokenizer(tokenizer_of("byte_level")).push(-1)
