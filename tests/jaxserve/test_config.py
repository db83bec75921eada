"""Architecture as data: what is refused, and what the numbers mean."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from jaxserve.config import (
    ENDLESS_TOKENS,
    Activation,
    AlibiSpec,
    AttentionSpec,
    BlockKind,
    CacheGroup,
    CacheKind,
    CacheSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeScaling,
    RopeSpec,
    StreamingCache,
    alternating_layers,
    cache_spec,
    dtype_bytes,
    uniform_layers,
)
from jaxserve.errors import ConfigError, UnsupportedError, UsageError

LAYER = LayerSpec(AttentionSpec(6, 2, 5), MlpSpec(7, Activation.SILU, gated=True), NormSpec())
WINDOWED = replace(LAYER, attention=replace(LAYER.attention, window=3))
CONFIG = ModelConfig("toy", 11, 8, (LAYER,), NormSpec(), max_context_tokens=16)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RopeSpec(0), "rotary_dim=0 must be positive and even"),
        (lambda: RopeSpec(7), "rotary_dim=7 must be positive and even"),
        (
            lambda: RopeSpec(8, scaling=RopeScaling.LINEAR, factor=0.5),
            r"rope factor=0\.5 must be at least 1",
        ),
        (
            lambda: RopeSpec(8, scaling=RopeScaling.YARN),
            "original_context_tokens=0 must be positive for rope scaling yarn",
        ),
        (
            lambda: RopeSpec(8, scaling=RopeScaling.LLAMA3, original_context_tokens=8),
            r"high_freq_factor=1\.0 must be above low_freq_factor=1\.0",
        ),
        (lambda: AttentionSpec(0, 1, 8), "num_heads=0, num_kv_heads=1, head_dim=8 must all be"),
        (lambda: AttentionSpec(4, 0, 8), "num_heads=4, num_kv_heads=0"),
        (lambda: AttentionSpec(4, 1, 0), "num_heads=4, num_kv_heads=1, head_dim=0"),
        (lambda: AttentionSpec(6, 4, 8), "num_kv_heads=4 does not divide num_heads=6"),
        (lambda: AttentionSpec(4, 1, 8, rope=RopeSpec(10)), "rotary_dim=10 exceeds head_dim=8"),
        (
            lambda: AttentionSpec(4, 1, 8, rope=RopeSpec(8), alibi=AlibiSpec()),
            "rope and alibi are both set; a layer takes at most one",
        ),
        (lambda: AttentionSpec(4, 1, 8, window=0), "window=0 must be positive; leave it out"),
        (lambda: AttentionSpec(4, 1, 8, soft_cap=0.0), r"soft_cap=0\.0 must be positive"),
        (
            lambda: AttentionSpec(4, 1, 8, sink_tokens=4),
            "sink_tokens=4 keeps tokens besides a window, and window=None; set a window",
        ),
        (lambda: AttentionSpec(4, 1, 8, window=8, sink_tokens=-1), "sink_tokens=-1 keeps tokens"),
        (lambda: MlpSpec(0, Activation.RELU, gated=False), "ffn_dim=0 must be positive"),
        (lambda: replace(LAYER, mlp_norm=False), "a serial block needs mlp_norm=True"),
        (lambda: replace(CONFIG, layers=()), "layers is empty; a model has at least one layer"),
        (lambda: replace(CONFIG, vocab_size=0), "vocab_size=0 must be positive"),
        (lambda: replace(CONFIG, embed_dim=-1), "embed_dim=-1 must be positive"),
        (lambda: replace(CONFIG, max_context_tokens=0), "max_context_tokens=0 must be positive"),
        (lambda: dtype_bytes("int3"), "dtype='int3' is not supported; use one of float32, bfl"),
    ],
)
def test_what_cannot_be_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        build()


def test_a_parallel_block_may_share_its_norm() -> None:
    assert not replace(LAYER, block=BlockKind.PARALLEL, mlp_norm=False).mlp_norm


def test_scores_are_scaled_by_the_root_of_the_head_unless_told() -> None:
    assert AttentionSpec(4, 1, 16).score_scale == 0.25
    assert AttentionSpec(4, 1, 16, scale=0.1).score_scale == 0.1


@pytest.mark.parametrize("spec", [LAYER, LAYER.attention, NormSpec(), CONFIG, RopeSpec(8)])
def test_specs_are_frozen_and_hashable(spec: Any) -> None:
    assert hash(spec) == hash(replace(spec))
    with pytest.raises((FrozenInstanceError, TypeError)):
        spec.anything = 1


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float8_e4m3fn", 1), ("int8", 1)],
)
def test_dtypes_have_their_sizes(dtype: str, size: int) -> None:
    assert dtype_bytes(dtype) == size


def test_a_token_leaves_keys_and_values_of_every_kv_head() -> None:
    spec = cache_spec(LAYER.attention, "bfloat16")
    assert spec == CacheSpec(CacheKind.FULL, (2, 2, 5), ("kv", "kv_heads", "head"), "bfloat16")
    assert spec.bytes_per_token == 2 * 2 * 5 * 2
    assert spec.bytes_per_sequence(100) == 100 * 40


def test_a_window_keeps_no_more_than_itself() -> None:
    spec = cache_spec(WINDOWED.attention, "float32")
    assert (spec.kind, spec.window) == (CacheKind.WINDOW, 3)
    assert spec.bytes_per_sequence(2) == 2 * 80
    assert spec.bytes_per_sequence(100) == 3 * 80


def test_a_streaming_model_keeps_sinks_and_a_window_and_has_no_end() -> None:
    config = CONFIG.streaming(window=12, sink_tokens=4)
    assert config.max_context_tokens == ENDLESS_TOKENS
    (group,) = config.cache_groups("float32")
    assert (group.spec.kind, group.spec.window, group.spec.sink_tokens) == (CacheKind.WINDOW, 12, 4)
    assert group.spec.bytes_per_sequence(1_000_000) == 16 * 80
    assert config.layers[0].attention.cached_tokens == StreamingCache(window=12).num_tokens == 16


def test_a_streaming_window_without_sinks_is_a_window() -> None:
    attention = CONFIG.streaming(window=16, sink_tokens=0).layers[0].attention
    assert attention == replace(LAYER.attention, window=16)
    assert attention.cached_tokens is None


def test_a_layer_with_a_window_as_small_stays_as_it_was_trained() -> None:
    wide = replace(LAYER, attention=replace(LAYER.attention, window=13))
    config = replace(CONFIG, layers=(WINDOWED, wide)).streaming(window=12)
    assert config.layers[0] == WINDOWED
    assert config.layers[1].attention == replace(LAYER.attention, window=12, sink_tokens=4)


def test_positions_inside_the_cache_need_no_dynamic_stretch() -> None:
    rope = RopeSpec(4, scaling=RopeScaling.DYNAMIC, factor=2.0, original_context_tokens=10)
    layer = replace(LAYER, attention=replace(LAYER.attention, rope=rope))
    config = replace(CONFIG, layers=(layer,))
    kept = config.streaming(window=6, sink_tokens=4).layers[0].attention.rope
    assert kept == replace(rope, scaling=RopeScaling.NONE)
    with pytest.raises(UnsupportedError, match=r"streaming over 11 tokens .* 'dynamic'"):
        config.streaming(window=7, sink_tokens=4)


def test_what_cannot_stream_is_refused() -> None:
    with pytest.raises(UsageError, match="keep 17 tokens and the model's context is 16; use a win"):
        CONFIG.streaming(window=13, sink_tokens=4)
    alibi = replace(LAYER, attention=AttentionSpec(6, 2, 5, alibi=AlibiSpec()))
    with pytest.raises(UnsupportedError, match=r"^streaming is not supported with ALiBi"):
        replace(CONFIG, layers=(alibi,)).streaming(window=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"window": 2.5}, r"window=2\.5 must be a whole number"),
        ({"sink_tokens": -1}, "sink_tokens=-1 must be a whole number of at least 0"),
    ],
)
def test_a_streaming_cache_has_whole_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        StreamingCache(**fields)


def test_layers_are_grouped_by_what_they_remember() -> None:
    other = replace(LAYER, mlp=replace(LAYER.mlp, ffn_dim=9))  # remembers the same
    config = replace(CONFIG, layers=(WINDOWED, LAYER, WINDOWED, other))
    windowed, full = config.cache_groups("float32")
    assert windowed == CacheGroup(cache_spec(WINDOWED.attention, "float32"), (0, 2))
    assert full == CacheGroup(cache_spec(LAYER.attention, "float32"), (1, 3))


def test_one_more_token_costs_the_sum_over_layers() -> None:
    small = replace(LAYER, attention=AttentionSpec(6, 1, 5))
    config = replace(CONFIG, layers=(LAYER, WINDOWED, small))
    assert config.num_layers == 3
    assert config.cache_bytes_per_token("float32") == 80 + 80 + 40


def test_layers_are_repeated_or_alternated() -> None:
    assert uniform_layers(LAYER, 3) == (LAYER, LAYER, LAYER)
    assert alternating_layers([WINDOWED, LAYER], 3) == (WINDOWED, LAYER, WINDOWED)


def test_configs_need_the_standard_library_alone() -> None:
    code = "import sys; had = {*sys.modules}; import jaxserve.config; print(*{*sys.modules} - had)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {module.split(".")[0] for module in done.stdout.split()}
    assert packages <= {*sys.stdlib_module_names, "jaxserve"}
