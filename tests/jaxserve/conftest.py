"""Small tokenizers of each style, trained once per run."""

import json
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as train

from jaxserve.tokenizer import Tokenizer

# Examples may take long on a busy machine; how long is not what they are about.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog, again and again and again",
    "Grüße aus Köln: naïve café, 3 € – 北京 и Москва",
    "isn't it? I'm sure they're here. She said 'yes'!",
] * 4

Save = Callable[..., Path]


def byte_level() -> tokenizers.Tokenizer:
    """Returns the style of GPT-2, Llama 3, Falcon, Qwen: every byte is in the vocabulary."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = train.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(["<tool call>", "é"])  # text as added tokens; "é" is also a byte's name
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return library


def sentencepiece(strip: bool) -> tokenizers.Tokenizer:
    """Returns the style of Llama 2 (`strip`) and Gemma: pieces with "▁", bytes as `<0xE2>`."""
    trainer = train.BpeTrainer(vocab_size=90, show_progress=False)
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(model["vocab"], key=model["vocab"].__getitem__)
    library = tokenizers.Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [(left, right) for left, right in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    library.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if strip else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library


def unigram() -> tokenizers.Tokenizer:
    """Returns the style of T5 and XLNet: pieces with "▁", the first of a text without space."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = train.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def word_piece() -> tokenizers.Tokenizer:
    """Returns the style of BERT: words in pieces, spaces cleaned up around punctuation."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=True)
    trainer = train.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def opaque() -> tokenizers.Tokenizer:
    """Returns a tokenizer of which we know no streaming form: the last token is special."""
    library = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = train.BpeTrainer(
        vocab_size=200, special_tokens=["<end>"], end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def undecoded() -> tokenizers.Tokenizer:
    """Returns a tokenizer without a decoder: tokens are joined by spaces."""
    library = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "é": 3}, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens([AddedToken("[END]")])
    return library


STYLES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "llama_2": lambda: sentencepiece(strip=True),
    "gemma": lambda: sentencepiece(strip=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "opaque": opaque,
    "undecoded": undecoded,
}


@pytest.fixture(scope="session")
def library_of() -> Callable[[str], tokenizers.Tokenizer]:
    """Returns a function from a style to a tokenizer of the `tokenizers` library, newly read."""
    trained: dict[str, str] = {}

    def get(style: str) -> tokenizers.Tokenizer:
        if style not in trained:
            trained[style] = STYLES[style]().to_str()
        return tokenizers.Tokenizer.from_str(trained[style])

    return get


@pytest.fixture(scope="session")
def save(
    library_of: Callable[[str], tokenizers.Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Save:
    """Returns a function that writes a style's tokenizer.json and other files to a directory.

    Files are given by name, `__` standing for the dot; one that is not a string becomes JSON.
    """

    def write(style: str | None, **files: object) -> Path:
        directory = tmp_path_factory.mktemp(style or "empty")
        if style is not None:
            library_of(style).save(str(directory / "tokenizer.json"))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return directory

    return write


@pytest.fixture(scope="session")
def tokenizer_of(save: Save) -> Callable[[str], Tokenizer]:
    """Returns a function from a style to its tokenizer."""
    loaded: dict[str, Tokenizer] = {}

    def get(style: str) -> Tokenizer:
        if style not in loaded:
            loaded[style] = Tokenizer.from_dir(save(style))
        return loaded[style]

    return get


@pytest.fixture(scope="session", params=list(STYLES))
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_of: Callable[[str], Tokenizer]
) -> Tokenizer:
    """Returns a tokenizer of every style in turn."""
    return tokenizer_of(request.param)
