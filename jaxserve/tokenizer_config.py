"""Reading the files that stand beside a tokenizer: special tokens, options, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jaxserve.errors import TokenizerError

DEFAULT_TEMPLATE = "default"

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES_FOLDER = "additional_chat_templates"
TEMPLATE_JSON_FILE = "chat_template.json"

_TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class TokenEntry:
    """A token as `added_tokens_decoder` states it.

    Args:
        id: its number.
        content: its text.
        special: whether decoding with `skip_special_tokens` leaves it out.
        lstrip: whether it takes the spaces before it with it; `rstrip`: those after it.
        single_word: whether it is found only as a whole word.
        normalized: whether it is looked for in the normalised text.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside a tokenizer say.

    Args:
        special_tokens: text of each named token, such as `bos_token`.
        extra_special_tokens: texts of special tokens without a name.
        added_tokens: tokens with stated numbers, by number.
        add_bos_token: whether encoding begins with `bos_token`; None leaves it to the tokenizer.
        add_eos_token: whether encoding ends with `eos_token`; None leaves it to the tokenizer.
        split_special_tokens: whether special tokens in a text are encoded as plain text.
        chat_templates: sources by name.
    """

    special_tokens: Mapping[str, str]
    extra_special_tokens: tuple[str, ...] = ()
    added_tokens: tuple[TokenEntry, ...] = ()
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    split_special_tokens: bool = False
    chat_templates: Mapping[str, str] | None = None

    @staticmethod
    def read(directory: Path) -> TokenizerConfig:
        """Returns what the files of `directory` say; each of them may be missing.

        `special_tokens_map.json` is read where `tokenizer_config.json` has no
        `added_tokens_decoder`, which came after it. Template files come before the templates in
        `tokenizer_config.json`, and those before `chat_template.json`.

        Raises:
            TokenizerError: a file is not what it should be.
        """
        config_file = directory / CONFIG_FILE
        config = read_json(config_file)
        named: Mapping[str, Any] = config
        if "added_tokens_decoder" not in config:
            named = {**config, **read_json(directory / SPECIAL_TOKENS_FILE)}
        special, extra = _special_tokens(named, config_file)
        return TokenizerConfig(
            special_tokens=special,
            extra_special_tokens=extra,
            added_tokens=_added_tokens(config, config_file),
            add_bos_token=_flag(config, "add_bos_token", config_file),
            add_eos_token=_flag(config, "add_eos_token", config_file),
            split_special_tokens=bool(_flag(config, "split_special_tokens", config_file)),
            chat_templates=_chat_templates(directory, config),
        )


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in `file`, empty where there is no such file.

    Raises:
        TokenizerError: it cannot be read, or is not a JSON object.
    """
    text = _read_text(file)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return cast("dict[str, Any]", value)


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}; download it again") from error


def _flag(config: Mapping[str, Any], name: str, file: Path) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{file}: {name}={value!r} is neither true nor false")
    return value


def _token_text(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get("content")
    if not isinstance(value, str):
        raise TokenizerError(f"{where} is {value!r}, expected a token's text or its 'content'")
    return value


def _special_tokens(named: Mapping[str, Any], file: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the tokens by name, and those without a name."""
    special: dict[str, str] = {}
    for name, value in named.items():
        # Other names may end so too: add_bos_token is a flag, image_token is a token.
        is_token = name in _TOKEN_NAMES or isinstance(value, str | Mapping)
        if name.endswith("_token") and value is not None and is_token:
            special[name] = _token_text(value, f"{file}: {name}")
    extra: list[str] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value: Any = named.get(name) or []
        if isinstance(value, Mapping):
            for key, token in cast("Mapping[str, Any]", value).items():
                special.setdefault(key, _token_text(token, f"{file}: {name}.{key}"))
        elif isinstance(value, list):
            items = cast("list[Any]", value)
            extra += [_token_text(token, f"{file}: {name}[{i}]") for i, token in enumerate(items)]
        else:
            raise TokenizerError(f"{file}: {name}={value!r} is neither a list nor an object")
    return special, tuple(dict.fromkeys(extra))


def _added_tokens(config: Mapping[str, Any], file: Path) -> tuple[TokenEntry, ...]:
    entries: list[TokenEntry] = []
    decoder: Any = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{file}: added_tokens_decoder is not an object")
    for key, value in cast("dict[str, Any]", decoder).items():
        where = f"{file}: added_tokens_decoder[{key!r}]"
        if not key.isdecimal() or not isinstance(value, dict):
            raise TokenizerError(f"{where}={value!r} is not a token with a number and flags")
        token = cast("dict[str, Any]", value)
        flags = {name: bool(_flag(token, name, file)) for name in _TOKEN_FLAGS if name in token}
        entries.append(TokenEntry(id=int(key), content=_token_text(token, where), **flags))
    return tuple(sorted(entries, key=lambda entry: entry.id))


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the templates by name, from the first of the places that has any."""
    templates: dict[str, str] = {}
    main = _read_text(directory / TEMPLATE_FILE)
    if main is not None:
        templates[DEFAULT_TEMPLATE] = main
    for file in sorted((directory / NAMED_TEMPLATES_FOLDER).glob("*.jinja")):
        templates[file.stem] = _read_text(file) or ""
    for file, value in (
        (directory / CONFIG_FILE, config),
        (directory / TEMPLATE_JSON_FILE, None),
    ):
        if not templates:
            fields = read_json(file) if value is None else value
            templates = _named_templates(fields.get("chat_template"), file)
    return templates


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    """Returns `chat_template`: one source, sources by name, or a list of names and sources."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list):
        entries = cast("list[Any]", value)
        if all(isinstance(entry, Mapping) for entry in entries):
            value = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(value, Mapping):
        named = cast("Mapping[Any, Any]", value)
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return dict(named)
    raise TokenizerError(f"{file}: chat_template is neither a string nor named strings")
