"""Strict reading of a config.json: each field is used, known not to matter, or refused.

    fields = Fields("llama", {"hidden_size": 32, "use_cache": True, "shiny": 1})
    fields.integer("hidden_size")         # 32
    fields.finish()                       # ConfigError: shiny=1 not known to the llama family ...

What is known not to matter stands in the lists below.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from jaxserve.errors import ConfigError, UnsupportedError

T = TypeVar("T")

PROVENANCE = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",  # read by family_for, like model_type
        "auto_map",  # names Python code beside the checkpoint; no such code is ever run
        "dtype",  # of the stored tensors, which say so themselves
        "model_type",
        "torch_dtype",
        "transformers_version",
    }
)
"""Fields that say where a checkpoint comes from."""

TRAINING = frozenset(
    {
        "attention_dropout",
        "classifier_dropout",
        "gradient_checkpointing",
        "hidden_dropout",
        "initializer_range",
        "output_router_logits",
        "problem_type",
    }
)
"""Fields that act in training only."""

MECHANICS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "use_bfloat16",
        "use_cache",
    }
)
"""Fields that say how another program computes or reports, not what."""

TEXT = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"})
"""Token ids, read where text is made of tokens; the model's mathematics has no use for them."""

IRRELEVANT = PROVENANCE | TRAINING | MECHANICS | TEXT

NEUTRAL: Mapping[str, Any] = {
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
"""Fields of every Hugging Face config that must keep their default here."""

SAMPLING = frozenset(
    {
        "do_sample",
        "max_length",
        "max_new_tokens",
        "min_length",
        "num_beams",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Fields that belong into generation_config.json."""


class Fields:
    """The fields of one config; remembers which were asked for, so that none goes unread.

    A field that is null counts as left out, unless a method says otherwise.
    """

    def __init__(self, family: str, values: Mapping[str, Any], path: str = "") -> None:
        self.family = family
        self._values = values
        self._path = path
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Returns whether the field is there and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a positive integer; without a default the field is required."""
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._wrong(name, value, "a positive integer")
        return value

    def count(self, name: str, default: int) -> int:
        """Returns a whole number of at least 0."""
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name, value, "a whole number of at least 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a positive finite number; without a default the field is required."""
        value = self._take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, value, "a number")
        if not (math.isfinite(value) and value > 0):
            raise self._wrong(name, value, "a positive finite number")
        return float(value)

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """Returns a positive integer, `default` where left out, None where null."""
        return self.integer(name) if self.has(name) else self._absent(name, default)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """Returns a positive number, `default` where left out, None where null."""
        return self.number(name) if self.has(name) else self._absent(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """Returns true or false."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def choice(self, name: str, default: str, table: Mapping[str, T]) -> T:
        """Returns what `table` has for the field's word.

        Raises:
            UnsupportedError: it has nothing; the message lists what there is.
        """
        value = self._take(name, default)
        if not isinstance(value, str) or value not in table:
            raise UnsupportedError(
                f"{self._named(name)}={value!r} is not supported by the {self.family} family; "
                f"supported: {', '.join(table)}"
            )
        return table[value]

    def words(self, name: str, default: list[str]) -> list[str]:
        """Returns a list of words."""
        value = self._take(name, default)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._wrong(name, value, "a list of words")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns a list of positive finite numbers."""
        value = self._take(name, None)
        if not isinstance(value, list) or not all(
            isinstance(one, int | float) and math.isfinite(one) and one > 0 for one in value
        ):
            raise self._wrong(name, value, "a list of positive numbers")
        return tuple(float(one) for one in value)

    def integers(self, name: str, default: list[int] | None = None) -> tuple[int, ...]:
        """Returns a list of whole numbers of at least 0; without a default it is required."""
        value = self._take(name, default)
        if not isinstance(value, list) or not all(
            isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
        ):
            raise self._wrong(name, value, "a list of whole numbers")
        return tuple(value)

    def table(self, name: str) -> Fields | None:
        """Returns the fields of a nested object, or None where it is left out or empty."""
        value = self._take(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return Fields(self.family, value, f"{self._named(name)}.") if value else None

    def only(self, name: str, allowed: Collection[Any], why: str) -> None:
        """Accepts the field if it is left out or has an allowed value.

        Raises:
            UnsupportedError: it has another one.
        """
        value = self._take(name, next(iter(allowed)))
        # 0 == False in Python, but not in a config.
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            wanted = " or ".join(repr(a) for a in allowed)
            raise UnsupportedError(
                f"{self._named(name)}={value!r} is not supported by the {self.family} family "
                f"({why}); it must be {wanted}"
            )

    def irrelevant(self, *names: str) -> None:
        """Accepts fields with any value."""
        self._read.update(names)

    def finish(self) -> None:
        """Checks that nothing is left unread.

        Raises:
            ConfigError: a field is not known.
            UnsupportedError: a field asks for something known that is not supported.
        """
        known = self._read
        if not self._path:
            for name, neutral in NEUTRAL.items():
                self.only(name, (neutral,), "it stands for another kind of model")
            known = self._read | IRRELEVANT
        left = {n: v for n, v in self._values.items() if n not in known and v is not None}
        if "quantization_config" in left:
            raise UnsupportedError(
                f"{self._named('quantization_config')} says that the weights are quantized, "
                "which is not supported; use the checkpoint in bfloat16, float16 or float32"
            )
        if not left:
            return
        shown = ", ".join(f"{self._named(name)}={value!r}" for name, value in left.items())
        remedy = "remove what does not change the model's mathematics"
        if left.keys() <= SAMPLING:
            remedy = "sampling defaults belong into generation_config.json: move them there"
        raise ConfigError(f"{shown}: not known to the {self.family} family; {remedy}")

    def _take(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(
                f"{self._named(name)} is missing; the {self.family} family needs it, "
                "so the config is incomplete or belongs to another architecture"
            )
        return default

    def _absent(self, name: str, default: T) -> T | None:
        self._read.add(name)
        return None if name in self._values else default

    def _wrong(self, name: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"{self._named(name)}={value!r} must be {wanted}")

    def _named(self, name: str) -> str:
        return self._path + name
