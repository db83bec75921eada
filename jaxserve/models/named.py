"""Published sizes by name, from the TOML files in configs/models.

    config = named_config("palm-540b")

A file names its family and gives the fields of the model's config.json in a table `config`:

    family = "llama"
    source = "https://huggingface.co/meta-llama/Llama-2-7b-hf"

    [config]
    hidden_size = 4096
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from importlib.resources.abc import Traversable

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError, UsageError
from jaxserve.models.family import family_named

SUFFIX = ".toml"


def model_names() -> tuple[str, ...]:
    """Returns the names that `named_config` knows, sorted."""
    found = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX)))


def named_config(name: str) -> ModelConfig:
    """Returns the architecture of a published size.

    Raises:
        UsageError: there is no such name; the message lists those there are.
    """
    if name not in model_names():
        raise UsageError(f"model {name!r} is not known; known: {', '.join(model_names())}")
    text = _folder().joinpath(name + SUFFIX).read_text(encoding="utf-8")
    return parse_config(text, f"configs/models/{name}{SUFFIX}")


def parse_config(text: str, origin: str) -> ModelConfig:
    """Returns the architecture that a TOML text describes.

    Args:
        origin: where the text comes from, for errors.

    Raises:
        ConfigError: it is not TOML, or a field is unknown, missing or inconsistent.
        UnsupportedError: the family, or something a field asks for, is not supported.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not TOML: {error}") from error
    wanted = {"family": str, "source": str, "config": dict}
    for key in sorted(wanted.keys() | document.keys()):
        if key not in wanted:
            raise ConfigError(
                f"{origin}: {key}={document[key]!r} is not known; a model has {', '.join(wanted)}"
            )
        if not isinstance(document.get(key), wanted[key]):
            raise ConfigError(f"{origin}: {key} is missing or no {wanted[key].__name__}; set it")
    return family_named(document["family"]).config(document["config"])


def _folder() -> Traversable:
    return files("jaxserve").joinpath("configs", "models")
