"""Small random checkpoints, written with the safetensors library itself."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.models.family import family_for

# Awkward on purpose: head_dim is not hidden_size / heads. Divides over every mesh of the tests.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "vocab_size": 104,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
    "bias": True,
    "vocab_size": 40,
}
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """A Hugging Face directory that a test may damage."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def write_config(self, **changes: Any) -> None:
        self.config = {**self.config, **changes}
        self.write_json("config.json", self.config)

    def write_json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value))

    def write_tensors(self, shards: int = 1) -> None:
        if shards == 1:
            save_file(self.tensors, self.path / SINGLE, metadata={"format": "pt"})
            return
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            names = sorted(self.tensors)[shard::shards]
            save_file({n: self.tensors[n] for n in names}, self.path / name)
            weight_map |= dict.fromkeys(names, name)
        self.write_json(INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})

    def index(self) -> dict[str, str]:
        return json.loads((self.path / INDEX).read_text())["weight_map"]

    def rewrite_header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the header of model.safetensors and leaves the data as it is."""
        raw = (self.path / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        write_raw(self.path / SINGLE, json.dumps(header).encode(), raw[8 + length :])


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def random_tensors(config: Mapping[str, Any], dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    family = family_for(config)
    random = np.random.default_rng(seed)
    sources = family.sources(family.config(config)).values()
    shapes = {source.tensor: source.shape for source in sources}
    return {
        name: random.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()
    }


Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Returns a function that writes a random checkpoint."""

    def write(
        config: dict[str, Any] = LLAMA,
        dtype: str = "bfloat16",
        shards: int = 1,
        name: str = "model",
        **changes: Any,
    ) -> Checkpoint:
        path = tmp_path / name
        path.mkdir()
        made = Checkpoint(path, config)
        made.write_config(**changes)
        made.tensors = random_tensors(made.config, dtype)
        made.write_tensors(shards)
        return made

    return write


@pytest.fixture
def llama(make: Make) -> Checkpoint:
    return make()


@pytest.fixture
def falcon_config() -> dict[str, Any]:
    return FALCON


@pytest.fixture
def raw() -> Callable[..., None]:
    """Returns a function that writes a safetensors file from its header's bytes and its data."""
    return write_raw
