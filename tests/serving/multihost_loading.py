"""One of several processes that load a model together; prints the bytes that it read.

First from a folder, then from an object store, where bytes are counted as the store gives them:
without gaps, and with those that are read along by default. Then from a converted checkpoint, as
TensorStore counts what it reads of files.

python multihost_loading.py ADDRESS NUM_PROCESSES PROCESS CONVERTED
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 2
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


def main(address: str, num_processes: int, process: int, converted: str) -> None:
    import jax

    from jaxserve.serving.multihost.group import Group
    from jaxserve.serving.multihost.join import start_jax

    start_jax(Group(address, num_processes, process))
    import fsspec

    from jaxserve.checkpoint import remote
    from jaxserve.checkpoint.hf import HfReader
    from jaxserve.checkpoint.locate import locate

    read, whole = 0, HfReader.read

    def counted(self, name, index):
        nonlocal read
        found = whole(self, name, index)
        read += found.nbytes
        return found

    HfReader.read = counted
    found: dict[str, Any] = load("tiny") | {"read": read}

    store = fsspec.filesystem("memory")
    for path in locate("tiny").iterdir():
        store.pipe_file(f"/models/tiny/{path.name}", path.read_bytes())
    ranges: list[int] = []
    cat_file = type(store).cat_file

    def given(self, path, start=None, end=None, **more):
        data = cat_file(self, path, start, end, **more)
        if path.endswith(".safetensors") and start:  # what starts at 0 is a header
            ranges.append(len(data))
        return data

    type(store).cat_file = given
    for name, gap_bytes in (("with_gaps", remote.GAP_BYTES), ("from_store", 0)):
        ranges.clear()
        remote.GAP_BYTES = gap_bytes
        found[name] = load("memory://models/tiny") | {"read": sum(ranges)}
    before = read_of_files()
    found["converted"] = load(converted) | {"read": read_of_files() - before}
    print(json.dumps(found), flush=True)
    jax.distributed.shutdown()


def read_of_files() -> int:
    """Returns the bytes that TensorStore has read of files."""
    import tensorstore

    metrics = tensorstore.experimental_collect_matching_metrics(BYTES_READ)
    return sum(value["value"] for metric in metrics for value in metric["values"])


def load(model: str) -> dict[str, int]:
    """Returns the bytes that this process holds of a model, and all that there are."""
    import jax

    from jaxserve.checkpoint import load_params
    from jaxserve.pallas_kernels import kernel_set
    from jaxserve.partitioning.layout_file import choose
    from jaxserve.serving.model_files import ModelFiles
    from jaxserve.serving.placing import places_of, program_of

    files = ModelFiles.find(model, "bfloat16")
    layout = choose(files.info.config, "bfloat16", mesh="2,2,2", layout="ws2d", attention="batch")
    program = program_of(files.info.config, "bfloat16", kernel_set(), layout)
    params = load_params(files.info, program.model, places_of(program))
    held = 0
    for leaf in jax.tree.leaves(params):
        # Devices that hold the same part share one read.
        parts = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        held += sum(parts.values())
    return {"held": held, "whole": files.info.nbytes}


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
