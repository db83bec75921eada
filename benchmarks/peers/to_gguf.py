"""Writes the benchmark's checkpoint as a bfloat16 GGUF file for llama.cpp, without a tokenizer.

    python -m benchmarks.peers.to_gguf DIR

Runs in the llama.cpp peer's Python: needs `gguf` and `numpy`. Weights keep their bits; norms widen
to float32, as llama.cpp wants them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(model: Path) -> Path:
    """Returns the GGUF file beside the checkpoint, after writing it unless it stands already."""
    path = model / "model-bf16.gguf"
    if path.exists():
        return path
    config = json.loads((model / "config.json").read_text())
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_header(writer, config)
    for name, bits in _read_bf16(model / "model.safetensors"):
        _add_tensor(writer, config, name, bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _add_header(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Adds the shape of the model."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def _add_tensor(
    writer: gguf.GGUFWriter, config: dict[str, Any], name: str, bits: np.ndarray
) -> None:
    """Adds one weight, given its bfloat16 bit patterns."""
    if bits.ndim == 1:
        norm = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(_gguf_name(name), norm)
        return
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        bits = _interleave_rotary(bits, config["head_dim"])
    writer.add_tensor(
        _gguf_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
    )


def _gguf_name(name: str) -> str:
    """Returns llama.cpp's name of a Hugging Face Llama weight."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def _interleave_rotary(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns [heads * head_dim, D], each head's rows reordered from halves to neighbouring pairs.

    Hugging Face rotates row i of a head with row i + head_dim / 2; llama.cpp's `llama` rotates
    rows 2i and 2i + 1.
    """
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _read_bf16(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each weight of a safetensors file as its bfloat16 bit patterns, uint16.

    The format is an 8-byte header length, a JSON header with offsets, then the data.
    """
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    data = np.memmap(path, np.uint8, "r", offset=8 + header_bytes)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; this writer takes BF16 checkpoints only")
        begin, end = entry["data_offsets"]
        yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


if __name__ == "__main__":
    print(write_gguf(Path(sys.argv[1])))
