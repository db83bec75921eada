"""generation_config.json: how a model's authors want it sampled.

Read strictly. A field is used, known to change nothing here, or refused unless its value asks
for nothing. What a file leaves out stays None: the neutral value is the sampler's to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.files import read_json
from jaxserve.errors import ConfigError, UnsupportedError

NAME = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and special tokens of a model; None where its files say nothing.

    Attributes:
        do_sample: False asks for the likeliest token each time.
        temperature: at least 0; 0 is the same as not sampling.
        top_k: at least 1.
        top_p: above 0, at most 1.
        min_p: from 0 to 1.
        repetition_penalty: above 0; 1 is neutral.
        max_new_tokens, max_length: limits of new tokens, and of prompt and new tokens together.
        min_new_tokens: no end of text before.
        eos_token_ids: each ends the text.
        bos_token_id, pad_token_id: first token of a text; filler.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def greedy(self) -> bool:
        """Returns whether the likeliest token is asked for; top_k, top_p, ... are then moot."""
        return self.do_sample is False or self.temperature == 0


_IRRELEVANT = frozenset(
    {
        # Where the file comes from.
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "transformers_version",
        # How Hugging Face computes, speculation included, and what it returns.
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "return_dict_in_generate",
        "return_legacy_cache",
        "speculation_type",
        "target_lookbehind",
        "use_cache",
        "use_mtp",
        # Checks of the logits that change no finite ones.
        "remove_invalid_values",
        "renormalize_logits",
        # Of beam search; num_beams itself must be 1.
        "diversity_penalty",
        "early_stopping",
        "length_penalty",
        "num_beam_groups",
        # Of encoder-decoder models, which no family is.
        "decoder_start_token_id",
    }
)

# Neutral beside null, false, 0, "", [] and {}.
_NEUTRAL: Mapping[str, float] = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1,
}


def read_generation_defaults(directory: Path, hf_config: Mapping[str, Any]) -> GenerationDefaults:
    """Returns the defaults that a checkpoint directory states.

    Special tokens that generation_config.json does not state are those of config.json.

    Raises:
        ConfigError: a field's value is out of range.
        UnsupportedError: a field asks for what is not supported.
    """
    file = directory / NAME
    fields = read_json(file) if file.exists() else {}
    for name in _TOKENS:
        if fields.get(name) is None and hf_config.get(name) is not None:
            fields[name] = hf_config[name]
    return parse_generation_config(fields, str(file if file.exists() else "config.json"))


def parse_generation_config(fields: Mapping[str, Any], where: str) -> GenerationDefaults:
    """Returns the defaults in the fields of a generation_config.json; errors name `where`.

    Raises:
        ConfigError: a field's value is out of range.
        UnsupportedError: a field asks for what is not supported.
    """
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _READ and value is not None:
            key, read = _READ[name]
            values[key] = read(f"{where}: {name}", value)
        elif name not in _READ and name not in _IRRELEVANT:
            _refuse_unless_neutral(where, name, value)
    return GenerationDefaults(**values)


def _refuse_unless_neutral(where: str, name: str, value: Any) -> None:
    if value in (None, False, 0, "", [], {}) or value == _NEUTRAL.get(name, 0):
        return
    raise UnsupportedError(
        f"{where}: {name}={value!r:.100} is not supported, and ignoring it would give other text "
        f"than the model's authors meant; remove {name} from the file to go on without it"
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false")
    return value


def _number(low: float, high: float, low_is_in: bool = False) -> Callable[[str, Any], float]:
    """Returns a reader of numbers between `low`, within or not, and `high`, within."""

    def read(name: str, value: Any) -> float:
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not (low < value <= high or (low_is_in and value == low)):
            lower = "at least" if low_is_in else "above"
            upper = f" and at most {high:g}" if math.isfinite(high) else ""
            raise ConfigError(f"{name}={value!r} must be a number {lower} {low:g}{upper}")
        return float(value)

    return read


def _count(low: int) -> Callable[[str, Any], int]:
    """Returns a reader of whole numbers from `low`."""

    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")
        return value

    return read


def _top_k(name: str, value: Any) -> int | None:
    # Zero switches it off in Hugging Face.
    return _count(0)(name, value) or None


def _temperature(name: str, value: Any) -> float:
    return _number(0, 2, low_is_in=True)(name, value)


def _token(name: str, value: Any) -> int | None:
    # Some older models write -1 for none.
    return None if value == -1 else _count(0)(name, value)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    found = [_token(name, item) for item in listed]
    return tuple(item for item in dict.fromkeys(found) if item is not None)


_Read = Callable[[str, Any], Any]
_TOKENS: Mapping[str, tuple[str, _Read]] = {
    "bos_token_id": ("bos_token_id", _token),
    "eos_token_id": ("eos_token_ids", _tokens),
    "pad_token_id": ("pad_token_id", _token),
}
# Field of the file -> (attribute, reader of its value).
_READ: Mapping[str, tuple[str, _Read]] = {
    **_TOKENS,
    "do_sample": ("do_sample", _flag),
    "temperature": ("temperature", _temperature),
    "top_k": ("top_k", _top_k),
    "top_p": ("top_p", _number(0, 1)),
    "min_p": ("min_p", _number(0, 1, low_is_in=True)),
    "repetition_penalty": ("repetition_penalty", _number(0, math.inf)),
    "max_new_tokens": ("max_new_tokens", _count(1)),
    "max_length": ("max_length", _count(1)),
    "min_new_tokens": ("min_new_tokens", _count(0)),
}
