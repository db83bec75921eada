"""The architecture that a plan is for: a name, a config.json or a checkpoint; no weights are read.

plan_config("palm-540b"); plan_config("DIR"); plan_config("DIR/config.json")
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

from jaxserve.checkpoint.locate import EMBEDDED, locate
from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError, JaxserveError, UsageError
from jaxserve.models.family import family_for
from jaxserve.models.named import model_names, named_config

MOST_LAYERS = 10_000
"""More of them are a mistake, and would take minutes and gigabytes to be listed."""

_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def plan_config(model: str | Path | ModelConfig) -> ModelConfig:
    """Returns an architecture.

    Raises:
        UsageError: there is no such name and no such file.
        ConfigError: config.json lacks a field, or has one that is not known, or too many layers.
        UnsupportedError: the family is not supported.
    """
    if isinstance(model, ModelConfig):
        return model
    if str(model) in model_names():
        return named_config(str(model))
    path = locate(model) if str(model) in EMBEDDED else Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UsageError(_unknown(str(model)))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is no JSON object; give a model's config.json")
    for name in _COUNTS:
        if isinstance(count := fields.get(name), int) and count > MOST_LAYERS:
            raise ConfigError(
                f"{path}: {name}={count} is more than {MOST_LAYERS} layers; give the model's own"
            )
    try:
        return family_for(fields).config(fields)
    except JaxserveError as error:
        raise type(error)(f"{path}: {error}") from error


def _unknown(model: str) -> str:
    """Returns that there is no such model, and the names that are like it, or all."""
    known = [*EMBEDDED, *model_names()]
    like = [name for name in known if model.lower() in name] or get_close_matches(model, known)
    more = f", or {len(known) - len(like)} others" if like else ""
    return (
        f"model {model!r} is not known: it is no file, no directory with a config.json, and none "
        f"of {', '.join(like or known)}{more}"
    )
