"""What `jaxserve info` tells of a checkpoint, from its headers and configuration alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jaxserve.checkpoint import CheckpointInfo
from jaxserve.config import CacheGroup, LayerSpec, ModelConfig

CACHE_DTYPE = "bfloat16"
WEIGHT_DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}


def describe(info: CheckpointInfo) -> dict[str, Any]:
    """Returns the facts of a checkpoint as plain data.

    Memory in other dtypes is parameters times bytes, scales of int8 not counted.
    """
    config = info.config
    parameters = info.num_parameters
    stored: Counter[str] = Counter()
    for tensor in info.tensors.values():
        stored[tensor.dtype] += tensor.nbytes
    groups = config.cache_groups(CACHE_DTYPE)
    return {
        "path": str(info.path),
        "format": str(info.format),
        "family": config.family,
        "layers": config.num_layers,
        "embed_dim": config.embed_dim,
        "vocab_size": config.vocab_size,
        "max_context_tokens": config.max_context_tokens,
        "tied_embeddings": config.tied,
        "layer_kinds": [
            {"count": count, "layer": _layer(spec, config.num_positions)}
            for spec, count in Counter(config.layers).items()
        ],
        "parameters": parameters,
        "stored_bytes": dict(sorted(stored.items())),
        "memory_bytes": {name: parameters * size for name, size in WEIGHT_DTYPES.items()},
        "cache_dtype": CACHE_DTYPE,
        "cache_bytes_per_token": config.cache_bytes_per_token(CACHE_DTYPE),
        "cache_groups": [_group(group, config) for group in groups],
    }


def table(facts: dict[str, Any]) -> str:
    """Returns the facts as aligned lines for people."""
    lines = [
        ("checkpoint", f"{facts['path']} ({facts['format']})"),
        ("family", facts["family"]),
        ("layers", str(facts["layers"])),
        *[(f"  {kind['count']} x", kind["layer"]) for kind in facts["layer_kinds"]],
        ("width", str(facts["embed_dim"])),
        ("vocabulary", f"{facts['vocab_size']:,}" + _tied(facts["tied_embeddings"])),
        ("context", f"{facts['max_context_tokens']:,} tokens"),
        ("parameters", f"{facts['parameters']:,}"),
        ("stored", ", ".join(f"{_size(n)} {d}" for d, n in facts["stored_bytes"].items())),
        ("memory", ", ".join(f"{_size(n)} in {d}" for d, n in facts["memory_bytes"].items())),
        (
            "KV cache",
            f"{_size(facts['cache_bytes_per_token'])} per token in {facts['cache_dtype']}",
        ),
        *[("", _group_line(group)) for group in facts["cache_groups"]],
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _layer(spec: LayerSpec, learned: int | None) -> str:
    """Returns one layer in words; `learned` positions stand beside the embedding."""
    a, m = spec.attention, spec.mlp
    kind = {1: "MQA", a.num_heads: "MHA"}.get(a.num_kv_heads, "GQA")
    position = "rope" if a.rope is not None else "alibi" if a.alibi is not None else ""
    position = position or ("no positions" if learned is None else f"{learned} learned positions")
    window = "" if a.window is None else f", window {a.window}"
    gate = "gated " if m.gated else ""
    experts = "" if m.experts is None else f", {m.experts.per_token} of {m.experts.count} experts"
    return (
        f"{spec.block} block, {spec.norm.kind} norm; {kind} {a.num_heads}/{a.num_kv_heads} heads "
        f"of {a.head_dim}, {position}{window}; {gate}{m.activation} MLP {m.ffn_dim}{experts}"
    )


def _group(group: CacheGroup, config: ModelConfig) -> dict[str, Any]:
    context = config.max_context_tokens
    return {
        "kind": str(group.spec.kind),
        "layers": len(group.layers),
        "window": group.spec.window,
        "bytes_per_token": group.spec.bytes_per_token * len(group.layers),
        "bytes_at_full_context": group.spec.bytes_per_sequence(context) * len(group.layers),
    }


def _group_line(group: dict[str, Any]) -> str:
    kept = "all tokens" if group["window"] is None else f"the last {group['window']} tokens"
    return (
        f"{group['layers']} layers keep {kept}: {_size(group['bytes_per_token'])} per token, "
        f"{_size(group['bytes_at_full_context'])} at full context"
    )


def _tied(tied: bool) -> str:
    return " (embeddings tied to the output)" if tied else ""


def _size(count: float) -> str:
    """Returns bytes in a unit that leaves at most four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
