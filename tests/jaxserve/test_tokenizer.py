import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import slow_tokenizer
from jaxserve.detokenize import IncrementalDetokenizer
from jaxserve.errors import TokenizerError, UsageError
from jaxserve.tokenizer import Tokenizer

LibraryOf = Callable[[str], tokenizers.Tokenizer]
Save = Callable[..., Path]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "add a"}]


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports warn of is not ours
        return pytest.importorskip("transformers", reason="needs transformers")


# Loading


def test_a_directory_without_tokenizer_names_what_was_looked_for(tmp_path: Path):
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_dir(tmp_path)
    for name in (str(tmp_path), "tokenizer.json", "tokenizer.model", "vocab.json", "token ids"):
        assert name in str(caught.value)


def test_a_path_that_is_no_directory_is_named(tmp_path: Path):
    with pytest.raises(TokenizerError, match="is not a directory"):
        Tokenizer.from_dir(tmp_path / "missing")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer__json": {"version": "1.0"}},
        {"tokenizer_config__json": "{"},
        {"tokenizer_config__json": [1]},
        {"tokenizer_config__json": {"bos_token": 3}},
        {"tokenizer_config__json": {"add_bos_token": "yes"}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "y"}}}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"1": {"special": True}}}},
        {"tokenizer_config__json": {"additional_special_tokens": "x"}},
        {"tokenizer_config__json": {"chat_template": 3}},
        {"tokenizer_config__json": {"chat_template": [{"name": "x"}]}},
        {"special_tokens_map__json": "null"},
        {"chat_template__json": {"chat_template": [3]}},
    ],
    ids=str,
)
def test_a_broken_file_is_named(save: Save, files: dict[str, Any]):
    with pytest.raises(TokenizerError, match=next(iter(files)).replace("__", ".")):
        Tokenizer.from_dir(save("byte_level", **files))


def test_bytes_that_are_not_text_are_an_error(save: Save):
    directory = save("byte_level")
    (directory / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_dir(directory)


# Special tokens


def test_named_tokens_come_from_either_file(save: Save):
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "pad_token": None}
    tokenizer = Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.unk_token_id is None
    newer = {"eos_token": "<|im_end|>", "pad_token": "<|end|>"}
    tokenizer = Tokenizer.from_dir(
        save("byte_level", tokenizer_config__json=config, special_tokens_map__json=newer)
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 3, 1)
    tokenizer = Tokenizer.from_dir(
        save(
            "byte_level",
            tokenizer_config__json={**config, "added_tokens_decoder": {}},
            special_tokens_map__json=newer,
        )
    )
    assert tokenizer.eos_token_id == 1


def test_without_other_files_no_token_is_named(tokenizer_of: Callable[[str], Tokenizer]):
    tokenizer = tokenizer_of("byte_level")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, ())
    assert tokenizer.is_special(0)
    assert not tokenizer.has_chat_template


def test_named_and_additional_tokens_are_special(save: Save):
    config = {"eos_token": "<tool call>", "additional_special_tokens": ["é"], "bos_token": "<new>"}
    tokenizer = Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))
    assert tokenizer.eos_token_id is not None
    assert tokenizer.is_special(tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer.encode("a<tool call>é<new>b")) == "ab"
    assert tokenizer.bos_token_id == tokenizer.vocab_size - 1


def test_added_tokens_of_the_config_are_added(save: Save, library_of: LibraryOf):
    size = library_of("byte_level").get_vocab_size()
    decoder = {
        str(size + 1): {"content": "<two>", "special": True},
        str(size): {"content": "<one>", "special": False, "lstrip": True},
    }
    config = {"added_tokens_decoder": decoder}
    tokenizer = Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))
    assert tokenizer.encode("a  <one><two>")[1:] == [*tokenizer.encode("a")[1:], size, size + 1]
    assert [tokenizer.is_special(i) for i in (size, size + 1)] == [False, True]
    assert tokenizer.vocab_size == size + 2


def test_flags_of_the_config_change_those_of_the_tokenizer(save: Save, library_of: LibraryOf):
    a = library_of("byte_level").token_to_id("a")
    decoder = {
        "0": {"content": "<|begin|>", "special": False, "rstrip": True, "normalized": False},
        str(a): {"content": "a", "special": True},
    }
    config = {"added_tokens_decoder": decoder, "num_image_token": 3, "image_token": "<|end|>"}
    tokenizer = Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))
    ids = tokenizer.encode("<|begin|>  a b", add_special_tokens=False)
    assert ids[:2] == [0, a]
    # What was special stays so: `decode` and `is_special` say the same.
    assert tokenizer.is_special(0)
    assert tokenizer.is_special(ids[1])
    assert tokenizer.decode(ids) == " b"


def test_added_tokens_with_impossible_numbers_are_refused(save: Save):
    config = {"added_tokens_decoder": {"9999": {"content": "<far>"}}}
    with pytest.raises(TokenizerError, match="'<far>' the id 9999"):
        Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))


# Encoding and decoding


@given(st.text(max_size=40))
def test_text_survives_encoding_and_decoding(tokenizer_of: Callable[[str], Tokenizer], text: str):
    for style in ("llama_2", "gemma"):
        tokenizer = tokenizer_of(style)
        if "▁" not in text and "<" not in text:  # "▁" stands for a space, "<s>" would be special
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("style", ["byte_level", "llama_2", "gemma", "unigram", "word_piece"])
def test_ids_and_text_are_those_of_transformers(
    transformers: ModuleType, save: Save, library_of: LibraryOf, style: str
):
    tokenizer = Tokenizer.from_dir(save(style))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=library_of(style))
    for text in ("", " ", "def add(a, b):\n", "naïve  café – 🦙", "<s>x</s>", "isn't . it ?"):
        for special in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == oracle.encode(text, add_special_tokens=special)
            for skip in (False, True):
                assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(
                    ids, skip_special_tokens=skip
                )


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, [1, 0]),
        ({"add_bos_token": True}, [1, 0]),
        ({"add_bos_token": False}, [0]),
        ({"add_eos_token": True}, [1, 0, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [0, 2]),
    ],
    ids=str,
)
def test_stated_bos_and_eos_are_added_or_left_out(
    save: Save, stated: dict[str, bool], expected: list[int]
):
    config = {"bos_token": "<s>", "eos_token": "</s>", **stated}
    tokenizer = Tokenizer.from_dir(save("llama_2", tokenizer_config__json=config))
    unknown = tokenizer.encode("<unk>", add_special_tokens=False)[-1:]
    assert unknown == [0]
    ids = [token for token in tokenizer.encode("<unk>") if token in (0, 1, 2)]
    assert ids == expected
    assert tokenizer.add_bos_token == (1 in expected)
    assert tokenizer.add_eos_token == (2 in expected)
    assert 1 not in tokenizer.encode("a", add_special_tokens=False)


def test_bos_is_added_where_the_tokenizer_adds_none(save: Save):
    config = {"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": True}
    tokenizer = Tokenizer.from_dir(save("unigram", tokenizer_config__json=config))
    bare = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.encode("the dog") == [tokenizer.bos_token_id, *bare]
    # There is no token to add.
    tokenizer = Tokenizer.from_dir(save("unigram", tokenizer_config__json={"add_bos_token": True}))
    assert tokenizer.encode("the dog") == bare
    assert not tokenizer.add_bos_token


def test_one_token_for_bos_and_eos_is_not_taken_for_both(save: Save):
    config = {"bos_token": "<s>", "eos_token": "<s>", "add_eos_token": True}
    tokenizer = Tokenizer.from_dir(save("llama_2", tokenizer_config__json=config))
    assert tokenizer.encode("") == [1, 1]
    del config["add_eos_token"]
    tokenizer = Tokenizer.from_dir(save("llama_2", tokenizer_config__json=config))
    assert tokenizer.encode("") == [1]
    assert not tokenizer.add_eos_token


def test_limits_of_the_training_run_do_not_apply(library_of: LibraryOf, tmp_path: Path):
    library = library_of("byte_level")
    library.enable_truncation(max_length=4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_dir(tmp_path).encode("the quick brown fox jumps over")
    assert 4 < len(ids) < 64


def test_special_tokens_in_text_can_be_plain_text(save: Save):
    plain = Tokenizer.from_dir(
        save("byte_level", tokenizer_config__json={"split_special_tokens": True})
    )
    assert 3 not in plain.encode("<|im_end|>")
    assert 3 in Tokenizer.from_dir(save("byte_level")).encode("<|im_end|>")


def test_text_without_utf8_form_is_refused(tokenizer_of: Callable[[str], Tokenizer]):
    with pytest.raises(UsageError, match=r"character 1 is a lone surrogate \(U\+D800\)"):
        tokenizer_of("byte_level").encode("a\ud800")
    with pytest.raises(UsageError, match="it is a int"):
        tokenizer_of("byte_level").encode(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"]])
def test_what_cannot_be_a_token_id_is_refused(
    tokenizer_of: Callable[[str], Tokenizer], ids: list[int]
):
    with pytest.raises(UsageError, match="pass token ids"):
        tokenizer_of("byte_level").decode(ids)


def test_ids_without_a_token_add_nothing(tokenizer: Tokenizer):
    beyond = tokenizer.vocab_size
    assert tokenizer.token(beyond) is None
    assert tokenizer.token(beyond - 1) is not None
    assert tokenizer.token_bytes(beyond) == b""
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert tokenizer.decode([beyond, *ids, beyond]) == tokenizer.decode(ids)


# Bytes of tokens


@given(st.text(max_size=20))
def test_bytes_of_tokens_add_up_to_the_text(tokenizer_of: Callable[[str], Tokenizer], text: str):
    for style in ("byte_level", "gemma"):
        tokenizer = tokenizer_of(style)
        if "▁" not in text and "é" not in text:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize(
    ("style", "token", "expected"),
    [
        ("byte_level", "Ġthe", b" the"),
        ("byte_level", "Ã", b"\xc3"),
        ("byte_level", "<tool call>", b"<tool call>"),
        ("llama_2", "<0xE2>", b"\xe2"),
        ("llama_2", "▁a", b" a"),
        ("unigram", "▁a", b" a"),
        ("word_piece", "##n", b"n"),
        ("word_piece", "d", b" d"),
    ],
)
def test_bytes_of_a_token_are_what_it_adds_to_a_text(
    tokenizer_of: Callable[[str], Tokenizer], style: str, token: str, expected: bytes
):
    tokenizer = tokenizer_of(style)
    token_id = tokenizer.backend.token_id(token)
    assert token_id is not None
    assert tokenizer.token_bytes(token_id) == expected


# Chat templates


def test_the_template_file_comes_before_the_config(save: Save):
    config = {"chat_template": "from the config"}
    both = save("byte_level", tokenizer_config__json=config, chat_template__jinja="from the file")
    assert Tokenizer.from_dir(both).apply_chat_template(HELLO) == "from the file"
    json_too = {"tokenizer_config__json": config, "chat_template__json": {"chat_template": "json"}}
    assert Tokenizer.from_dir(save("byte_level", **json_too)).apply_chat_template(HELLO) == (
        "from the config"
    )
    only_json = save("byte_level", chat_template__json={"chat_template": "from the json"})
    assert Tokenizer.from_dir(only_json).apply_chat_template(HELLO) == "from the json"


def test_a_template_is_chosen_by_name_or_by_tools(save: Save):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = Tokenizer.from_dir(
        save("byte_level", tokenizer_config__json={"chat_template": named})
    )
    assert tokenizer.apply_chat_template(HELLO) == "plain"
    assert tokenizer.apply_chat_template(HELLO, tools=[]) == "plain"
    assert tokenizer.apply_chat_template(HELLO, tools=[{"name": "f"}]) == "tools"
    assert tokenizer.apply_chat_template(HELLO, template="tool_use") == "tools"
    with pytest.raises(TokenizerError, match=r"'rag'.*\['default', 'tool_use'\]"):
        tokenizer.apply_chat_template(HELLO, template="rag")


def test_named_template_files_are_found(save: Save):
    directory = save("byte_level", chat_template__jinja="plain")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("documents")
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.apply_chat_template(HELLO) == "plain"
    assert tokenizer.apply_chat_template(HELLO, template="rag") == "documents"


def test_templates_see_special_tokens_and_given_variables(save: Save):
    config = {
        "bos_token": "<|begin|>",
        "image_token": "<image>",
        "chat_template": "{{ bos_token }}{{ image_token }}{{ unk_token }}{{ mood }}",
    }
    tokenizer = Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))
    assert tokenizer.apply_chat_template(HELLO, mood="calm") == "<|begin|><image>calm"


def test_without_a_template_the_places_are_named(tokenizer_of: Callable[[str], Tokenizer]):
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        tokenizer_of("byte_level").chat(HELLO)


def test_a_broken_template_does_not_stop_completions(save: Save):
    tokenizer = Tokenizer.from_dir(save("byte_level", chat_template__jinja="{% if %}"))
    assert tokenizer.encode("a")
    with pytest.raises(TokenizerError, match="does not compile: line 1"):
        tokenizer.chat(HELLO)


def test_a_chat_has_the_bos_that_its_template_writes_and_no_other(save: Save):
    config = {"bos_token": "<|begin|>", "chat_template": "{{ bos_token }}" + CHATML}
    tokenizer = Tokenizer.from_dir(save("byte_level", tokenizer_config__json=config))
    ids = tokenizer.chat(HELLO)
    assert ids.count(0) == 1
    assert ids[:2] == [0, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|begin|><|im_start|>user\nadd a<|im_end|>\n<|im_start|>assistant\n"
    )
    without = Tokenizer.from_dir(save("byte_level", chat_template__jinja=CHATML))
    assert without.chat(HELLO, add_generation_prompt=False).count(0) == 0


def test_chats_are_those_of_transformers(
    transformers: ModuleType, save: Save, library_of: LibraryOf
):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    tokenizer = Tokenizer.from_dir(
        save("llama_2", tokenizer_config__json=config, chat_template__jinja=template)
    )
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library_of("llama_2"), chat_template=template, **config
    )
    assert tokenizer.chat(HELLO) == oracle.apply_chat_template(HELLO, return_dict=False)


# Tokenizers without tokenizer.json


def test_vocab_and_merges_files_are_read_through_transformers(
    transformers: ModuleType, save: Save, library_of: LibraryOf
):
    library = library_of("byte_level")
    directory = save(None, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"})
    library.model.save(str(directory))
    assert not (directory / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_dir(directory)
    ids = tokenizer.encode("def add(a, b):\n    naïve 🦙")
    assert ids == library.encode("def add(a, b):\n    naïve 🦙", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "def add(a, b):\n    naïve 🦙"
    assert tokenizer.text_stream() is not None
    assert tokenizer.eos_token_id is not None  # the class's own "<|endoftext|>"
    assert tokenizer.is_special(tokenizer.eos_token_id)


def test_a_tokenizer_written_in_python_is_used_as_it_is(transformers: ModuleType, save: Save):
    words = ["<unk>", "hel@@", "lo", "world", "l", "o</w>", "h@@"]
    directory = save(
        None,
        vocab__json={word: index for index, word in enumerate(words)},
        merges__txt="#version: 0.2\nl o</w>\nh e\nhe l\n",
        tokenizer_config__json={"tokenizer_class": "CTRLTokenizer"},
    )
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.text_stream() is None
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([1, 2, 3, 99]) == "hello world"
    assert tokenizer.vocab_size == len(words)
    assert tokenizer.unk_token_id == 0
    assert tokenizer.is_special(0)
    assert tokenizer.token_bytes(3) == b"world"
    detokenizer = IncrementalDetokenizer(tokenizer)
    streamed = [detokenizer.push(token) for token in (1, 2, 0, 99, 3)]
    assert streamed == ["", "hel", "", "", "lo"]
    assert detokenizer.finish() == " world"


def test_a_sentencepiece_model_is_read_through_transformers(
    transformers: ModuleType, tmp_path: Path
):
    trainer = pytest.importorskip("sentencepiece", reason="trains a model with sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog again and again\n" * 50)
    directory = tmp_path / "model"
    directory.mkdir()
    trainer.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'
    (directory / "tokenizer_config.json").write_text(config)
    tokenizer = Tokenizer.from_dir(directory)
    pieces = trainer.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    for text in ("the lazy dog", "naïve 🦙 fox"):
        assert tokenizer.encode(text) == [1, *pieces.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("file", "missing"),
    [("vocab__json", "transformers"), ("tokenizer__model", "sentencepiece")],
)
def test_a_missing_package_is_named(
    save: Save, monkeypatch: pytest.MonkeyPatch, file: str, missing: str
):
    def find(name: str) -> object:
        return None if name == missing else object()

    monkeypatch.setattr(slow_tokenizer, "find_spec", find)
    with pytest.raises(TokenizerError, match=f"pip install {missing}"):
        Tokenizer.from_dir(save(None, **{file: {}}))


def test_what_transformers_cannot_read_is_an_error(transformers: ModuleType, save: Save):
    with pytest.raises(TokenizerError, match="transformers cannot load the tokenizer of"):
        Tokenizer.from_dir(save(None, vocab__json="{", config__json={"model_type": "gpt2"}))


def test_code_of_a_checkpoint_is_never_run(transformers: ModuleType, save: Save):
    directory = save(
        None,
        vocab__txt="a\nb\n",
        evil__py="raise SystemExit('ran')",
        tokenizer_config__json={
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        },
    )
    with pytest.raises(TokenizerError, match="trust_remote_code"):
        Tokenizer.from_dir(directory)
