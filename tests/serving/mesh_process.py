"""One of several processes that serve one model on one mesh; prints its tokens.

python mesh_process.py ADDRESS NUM_PROCESSES PROCESS
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4


def main(address: str, num_processes: int, process: int) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes, process)
    from jaxserve.pallas_kernels import kernel_set
    from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
    from jaxserve.partitioning.mesh import MeshPlan, make_mesh
    from jaxserve.serving.generation import Program
    from jaxserve.serving.sharded import param_specs, shardings
    from tests.serving.test_mesh_engine import MODEL, served, small, values

    layouts = PhaseLayout(Ffn.WG_XY, Heads.BATCH), PhaseLayout(Ffn.WS2D, Heads.BATCH)
    mesh = make_mesh(MeshPlan(2, 2, 2))
    program = Program.on(MODEL, kernel_set(), mesh, *layouts)
    placed = jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
        jax.device_get(values()),
        shardings(mesh, param_specs(program)),
    )
    found, _ = served(program, placed, small(program))
    print(json.dumps([[*sample, tokens] for sample, tokens in sorted(found.items())]))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
