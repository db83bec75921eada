"""The small files of a checkpoint directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError

# What a model directory holds beside weights: converted checkpoints carry these along, and a
# download asks for nothing else.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def expanded(path: str | Path) -> Path:
    """Returns the path with a leading ~ replaced by the home directory it stands for, if any."""
    return Path(os.path.expanduser(path))


def companions(directory: Path) -> list[Path]:
    """Returns the files of `directory` that go with its weights, sorted."""
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        CheckpointError: the file is missing, is not JSON, is not an object or repeats a key.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the directory of a Hugging Face checkpoint, "
            "or of one that `jaxserve convert` wrote"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return parse_object(text, str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object in `text`; errors name `where`.

    Raises:
        CheckpointError: the text is not JSON, is not an object or repeats a key.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not valid JSON ({error}); copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}; expected an object")
    return value


def _unrepeated(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {repeated!r} stands twice")
    return found
