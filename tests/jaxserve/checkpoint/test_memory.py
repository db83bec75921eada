"""Loading needs little more memory than the weights themselves.

Anonymous memory is measured: pages of a mapped file are the kernel's to drop.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.models.family import family_for

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MEASURE = """
import sys, threading
from pathlib import Path
import jax
from jaxserve.checkpoint import inspect, load_params
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Orientation

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

def watch():
    while not done.wait(0.005):
        peaks.append(anonymous())

path, orientation, fuse = sys.argv[1:]
before, peaks, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
info = inspect(path)
declare = Declare("bfloat16", Orientation(orientation), fuse == "fuse")
params = load_params(info, Model(info.config, declare))
done.set()
watcher.join()
print(sum(a.nbytes for a in jax.tree.leaves(params)), max(peaks) - before, len(peaks))
"""


def write_large(directory: Path, dtype: str) -> None:
    """Writes about 200 million weights, all zero, as a file with holes: no disk is waited for."""
    family = family_for(CONFIG)
    header, end = {}, 0
    for source in family.sources(family.config(CONFIG)).values():
        start, end = end, end + math.prod(source.shape) * (2 if dtype == "BF16" else 4)
        entry = {"dtype": dtype, "shape": source.shape, "data_offsets": [start, end]}
        header[source.tensor] = entry
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(CONFIG))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "orientation", "fuse"),
    [("BF16", "in_out", "apart"), ("F32", "out_in", "fuse")],
)
def test_peak_memory_stays_near_the_weights(
    tmp_path: Path, dtype: str, orientation: str, fuse: str
):
    write_large(tmp_path, dtype)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, orientation, fuse],
        capture_output=True,
        text=True,
        check=True,
    )
    weights, peak, samples = (int(word) for word in done.stdout.split())
    # Embedding, head and last norm; a layer's q and out, k and v, MLP, norms; two bytes each.
    layer = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024
    assert weights == 2 * (2 * 32000 * 1024 + 1024 + 9 * layer)
    assert samples > 10
    assert weights < peak < 1.2 * weights + 300e6, f"{peak / 1e6:.0f} MB"
