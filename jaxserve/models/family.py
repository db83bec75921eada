"""What a model family is, and which one a config.json belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError, UnsupportedError
from jaxserve.models.fields import Fields

T = TypeVar("T")

MODULES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "falcon",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "mpt",
    "baichuan",
    "chatglm",
    "decilm",
    "palm",
)
"""Modules of this package that hold a `FAMILY`."""


def identity(tensor: np.ndarray) -> np.ndarray:
    """Returns the tensor."""
    return tensor


@dataclass(frozen=True)
class Source:
    """Where a logical weight comes from in a checkpoint.

    Attributes:
        tensor: name in the checkpoint; several weights may come from one tensor.
        shape: shape the tensor must have there.
        select: tensor -> [*outputs, *inputs], or the vector; slices and reshapes only.
        stacked: tensors alike, `tensor` the first, that the weight has one after the other in a
            dimension of its own, before the outputs; empty where the weight is of one tensor.
    """

    tensor: str
    shape: tuple[int, ...]
    select: Callable[[np.ndarray], np.ndarray] = identity
    stacked: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Returns the names of all tensors that the weight is made of."""
        return self.stacked or (self.tensor,)


@dataclass(frozen=True)
class Family:
    """Models whose checkpoints look alike.

    Attributes:
        name: label, also `ModelConfig.family`.
        architectures: entries of "architectures" in config.json.
        model_types: values of "model_type" in config.json.
        read: fields of config.json -> configuration.
        sources: configuration -> logical name of every weight -> where it comes from.
        ignorable: patterns of tensor names that carry no weights of their own.
        base: how all names begin, but for those of a model saved without its head.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[Fields], ModelConfig]
    sources: Callable[[ModelConfig], dict[str, Source]]
    ignorable: tuple[str, ...] = ()
    base: str = ""

    def config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Returns the architecture that a config.json describes.

        Raises:
            ConfigError: a field is unknown, missing or inconsistent.
            UnsupportedError: a field asks for something that is not supported.
        """
        fields = Fields(self.name, hf)
        config = self.read(fields)
        fields.finish()
        return config

    def full_names(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Returns a checkpoint's tensors by the names that they have in a model with its head."""
        whole = not self.base or any(name.startswith(self.base) for name in tensors)
        return {name if whole else self.base + name: one for name, one in tensors.items()}

    def ignored(self, name: str) -> bool:
        """Returns whether a tensor that is no weight's source may stand in a checkpoint.

        Such are rotary frequencies, which follow from the config, and the output head of a tied
        model, which is the embedding once more.
        """
        return any(re.fullmatch(pattern, name) for pattern in self.ignorable)


def families() -> tuple[Family, ...]:
    """Returns every supported family."""
    return tuple(import_module(f"jaxserve.models.{module}").FAMILY for module in MODULES)


def family_named(name: str) -> Family:
    """Returns the family called `name`.

    Raises:
        UnsupportedError: there is none.
    """
    for family in families():
        if family.name == name:
            return family
    names = ", ".join(family.name for family in families())
    raise UnsupportedError(f"family={name!r} is not supported; supported: {names}")


def family_for(hf_config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json, by "architectures", or "model_type" without it.

    Raises:
        ConfigError: the config names neither, or they contradict each other.
        UnsupportedError: the architecture is not supported.
    """
    architectures = hf_config.get("architectures") or []
    model_type = hf_config.get("model_type")
    if not architectures and model_type is None:
        raise ConfigError(
            "the config names neither architectures nor model_type; "
            'add for example "architectures": ["LlamaForCausalLM"]'
        )
    if not isinstance(architectures, list) or len(architectures) > 1:
        raise ConfigError(f"architectures={architectures!r} must be a list with one entry")
    for family in families():
        if architectures:
            known = architectures[0] in family.architectures
        else:
            known = model_type in family.model_types
        if known and model_type is not None and model_type not in family.model_types:
            raise ConfigError(
                f"model_type={model_type!r} contradicts architectures={architectures!r}, "
                f"whose model_type is {' or '.join(family.model_types)!r}"
            )
        if known:
            return family
    found = f"architecture {architectures[0]!r}" if architectures else f"model_type {model_type!r}"
    supported = ", ".join(name for family in families() for name in family.architectures)
    raise UnsupportedError(f"{found} is not supported; supported: {supported}")
