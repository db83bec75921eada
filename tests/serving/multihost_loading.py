"""One of several processes that load a model together; prints the bytes that it read.

python multihost_loading.py ADDRESS NUM_PROCESSES PROCESS
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 2


def main(address: str, num_processes: int, process: int) -> None:
    import jax

    from jaxserve.serving.multihost.group import Group
    from jaxserve.serving.multihost.join import start_jax

    start_jax(Group(address, num_processes, process))
    from jaxserve.checkpoint import load_params
    from jaxserve.checkpoint.hf import HfReader
    from jaxserve.pallas_kernels import kernel_set
    from jaxserve.partitioning.layout_file import choose
    from jaxserve.serving.model_files import ModelFiles
    from jaxserve.serving.placing import places_of, program_of

    read, whole = 0, HfReader.read

    def counted(self, name, index):
        nonlocal read
        found = whole(self, name, index)
        read += found.nbytes
        return found

    HfReader.read = counted
    files = ModelFiles.find("tiny", "bfloat16")
    layout = choose(files.info.config, "bfloat16", mesh="2,2,2", layout="ws2d", attention="batch")
    program = program_of(files.info.config, "bfloat16", kernel_set(), layout)
    params = load_params(files.info, program.model, places_of(program))
    held = 0
    for leaf in jax.tree.leaves(params):
        # Devices that hold the same part share one read.
        parts = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        held += sum(parts.values())
    print(json.dumps({"read": read, "held": held, "whole": files.info.nbytes}), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
