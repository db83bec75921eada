"""Estimates of our TPU kernels by the TPU's compiler, on a machine without a TPU.

    python tools/tpu_cycles.py '{"chip": "v5e", "kernel": "int8_matmul", "mode": "w8a16",
        "rows": 16, "inputs": 4096, "channels": 4096, "tile": [64, 1024, 1024]}'

prints one JSON object: the compiler's cycles, vector registers that it had to keep in memory, and
the roofline. Each case is compiled in a process of its own, which the compiler may abort. Nothing
here has run on a TPU: cycles are the compiler's static profile, whose copies are optimistic, so a
time is the larger of cycles by clock and bytes by bandwidth.

Decode attention is estimated by its inner loop: the kernel is compiled with a known number of
blocks, copying nothing, and the difference between two such numbers is the cost of a block.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 900


@dataclass(frozen=True)
class Chip:
    """A chip as far as a kernel's core sees it.

    Attributes:
        topology: libtpu's name of a small slice.
        options: what else libtpu needs to know.
        clock_hz: of a core.
        hbm_bytes_per_s: a core's share.
        bf16_flops, int8_ops: of a core, a second.
        cores: of a device, which share a grid's parallel dimensions.
    """

    topology: str
    options: tuple[tuple[str, str], ...]
    clock_hz: float
    hbm_bytes_per_s: float
    bf16_flops: float
    int8_ops: float
    cores: int = 1


CHIPS = {
    "v5e": Chip("v5e:2x2", (), 1.5e9, 8.2e11, 1.97e14, 3.94e14),
    "v6e": Chip("v6e:2x2", (), 1.75e9, 1.64e12, 9.2e14, 1.84e15),
    "v5p": Chip("v5p:2x2x1", (), 1.75e9, 1.3825e12, 2.295e14, 4.59e14, 2),
    "v4": Chip("v4:2x2x1", (("chip_config_name", "megacore"),), 1.05e9, 6.15e11, 1.375e14, 0, 2),
}
"""v4 compiles, and has no profile. v5p and v4 have two cores; these are the figures of one."""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


class CompilerFailed(RuntimeError):
    """The compiler refused a case or aborted on it."""


def estimate(case: dict[str, Any]) -> dict[str, Any]:
    """Returns what the compiler says of a case, measured in a child process.

    Raises:
        CompilerFailed: it refused the case.
    """
    with tempfile.TemporaryDirectory(prefix="tpu-cycles-") as folder:
        flags = [
            f"--xla_jf_dump_static_llo_profile_to={folder}/profile",
            "--xla_tpu_check_llo_types=false",
            f"--xla_jf_dump_to={folder}/code",
            "--xla_jf_dump_llo_text=true",
        ]
        environment = {**os.environ, **_ENVIRONMENT, "TMPDIR": folder}
        # A v4 has no static profile, and its code needs no flag.
        environment["LIBTPU_INIT_ARGS"] = " ".join(flags[2 if case["chip"] == "v4" else 0 :])
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(case)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise CompilerFailed(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        return found | {"spills": spills(Path(folder) / "code")}


def spills(folder: Path) -> int:
    """Returns the loads and stores by which our kernels keep vector registers in memory."""
    pattern = re.compile(r"vmem:\[#allocation\d+_spill")
    files = [p for p in folder.glob("*final_bundles.txt") if "schedule" not in p.name]
    ours = [p for p in files if "paged_attention" in p.name or "matmul" in p.name]
    return sum(len(pattern.findall(path.read_text(errors="replace"))) for path in ours)


def _cycles(compiled: Any) -> int:
    """Returns the estimate of the program's last custom call: ours, as a case has one kernel."""
    found = re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())
    return int(found[-1]) if found else 0


def _shaped(chip: Chip) -> Callable[..., Any]:
    """Returns a maker of abstract arrays on one device of a chip."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology, **dict(chip.options)
    )
    own = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    return lambda shape, dtype: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=own)


def int8_matmul(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the estimate of a whole matmul."""
    import jax
    import jax.numpy as jnp

    from jaxserve.pallas_kernels.int8_matmul import Mode
    from jaxserve.pallas_kernels.int8_matmul.tiles import Tile
    from jaxserve.pallas_kernels.int8_matmul.tpu import int8_matmul as multiply

    chip = CHIPS[case["chip"]]
    shaped = _shaped(chip)
    rows, inputs, channels = case["rows"], case["inputs"], case["channels"]
    tile, orientation = Tile(*case["tile"], cores=chip.cores), case.get("orientation", "in_out")

    def call(x: Any, w: Any, scales: Any) -> Any:
        return multiply(
            x, w, scales, 1, orientation, "bfloat16", mode=Mode(case["mode"]), tile=tile,
            interpret=False,
        )  # fmt: skip

    given = (
        shaped((rows, inputs), jnp.bfloat16),
        shaped((channels, inputs) if orientation == "out_in" else (inputs, channels), jnp.int8),
        shaped((channels,), jnp.float32),
    )
    cycles = _cycles(jax.jit(call).lower(*given).compile())
    moved = inputs * channels + 2 * rows * (inputs + channels) + 4 * channels
    peak = chip.cores * (chip.int8_ops if case["mode"] == "w8a8" else chip.bf16_flops)
    copied_s = moved / chip.hbm_bytes_per_s / chip.cores
    floor_s = max(copied_s, 2 * rows * inputs * channels / peak)
    time_s = max(cycles / chip.clock_hz, copied_s)
    return {
        "cycles": cycles,
        "bytes": moved,
        "flops": 2 * rows * inputs * channels,
        "roofline_us": round(floor_s * 1e6, 3),
        "estimated_us": round(time_s * 1e6, 3),
        "over_roofline": round(time_s / floor_s, 3),
    }


def jax_matmul(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the estimate of the bfloat16 matmul that comes with JAX: another structure."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    chip = CHIPS[case["chip"]]
    shaped = _shaped(chip)
    rows, inputs, channels = case["rows"], case["inputs"], case["channels"]
    block_rows, block_channels, block_inputs = case["tile"]

    def call(x: Any, w: Any) -> Any:
        blocks = min(block_rows, rows), block_channels
        return matmul(x, w, block_shape=blocks, block_k=min(block_inputs, inputs))

    given = shaped((rows, inputs), jnp.bfloat16), shaped((inputs, channels), jnp.bfloat16)
    cycles = _cycles(jax.jit(call).lower(*given).compile())
    moved = 2 * (inputs * channels + rows * (inputs + channels))
    copied_s = moved / chip.hbm_bytes_per_s / chip.cores
    flops = 2 * rows * inputs * channels
    floor_s = max(copied_s, flops / chip.bf16_flops / chip.cores)
    time_s = max(cycles / chip.clock_hz, copied_s)
    return {
        "cycles": cycles,
        "bytes": moved,
        "flops": flops,
        "roofline_us": round(floor_s * 1e6, 3),
        "estimated_us": round(time_s * 1e6, 3),
        "over_roofline": round(time_s / floor_s, 3),
    }


def paged_attention(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the estimate of a block of keys in decode attention."""
    import jax

    chip = CHIPS[case["chip"]]
    few, many, items = 2, 6, 4
    found = []
    for trips in (few, many):
        build, given = _attention(case, items, trips)
        from jaxserve.pallas_kernels.paged_attention.mosaic import attend

        def call(given: Any, build: Any = build) -> Any:
            return attend(build, given, False)[0]

        found.append(_cycles(jax.jit(call).lower(given).compile()))
    cycles = (found[1] - found[0]) / (many - few) / items
    page = given.pages
    block = build.pages_per_block * page.size // page.shape[0] * page.dtype.itemsize
    hbm_cycles = block / chip.hbm_bytes_per_s * chip.clock_hz
    return {
        "block_keys": build.block,
        "block_bytes": block,
        "block_flops": 4 * build.spec.num_heads * build.spec.head_dim * build.block,
        "cycles_per_block": round(cycles),
        "hbm_cycles_per_block": round(hbm_cycles),
        "of_hbm_time": round(cycles / hbm_cycles, 3),
    }


def _attention(case: dict[str, Any], items: int, trips: int) -> tuple[Any, Any]:
    """Returns (build, abstract operands) of a decode kernel."""
    import jax.numpy as jnp

    from jaxserve.config import AlibiSpec, AttentionSpec
    from jaxserve.pallas_kernels.paged_attention import mosaic
    from jaxserve.pallas_kernels.paged_attention.items import Item

    shaped = _shaped(CHIPS[case["chip"]])
    spec = AttentionSpec(
        case["heads"], case["kv_heads"], case["head_dim"], soft_cap=case.get("soft_cap"),
        alibi=AlibiSpec() if case.get("alibi") else None,
    )  # fmt: skip
    page_size, dtype = case.get("page_size", 128), jnp.dtype(case.get("pages", "bfloat16"))
    scaled = dtype.itemsize == 1
    per_block = max(1, case["keys"] // page_size)
    width = 8 * per_block
    build = mosaic.Build(
        spec=spec, queries=1, page_size=page_size, pages_per_block=per_block, width=width,
        pinned_pages=0, sink_tokens=0, newest=0, sink_queries=False, scaled=scaled, lse=False,
        written=False, items=items, cores=1, out_dtype="bfloat16", trips=trips, copies=False,
    )  # fmt: skip
    heads, lanes = spec.num_kv_heads, mosaic.row_lanes(spec.head_dim)
    scale_rows = -(-2 * heads // mosaic.SUBLANES) * mosaic.SUBLANES
    return build, mosaic.Operands(
        items=shaped((items * Item.SIZE,), jnp.int32),
        first=shaped((1,), jnp.int32),
        table=shaped((items * width,), jnp.int32),
        q=shaped((items, heads, build.rows, mosaic.key_lanes(spec.head_dim)), jnp.bfloat16),
        q_sink=None,
        q_pos=None,
        slopes=shaped((heads, build.rows, 1), jnp.float32) if spec.alibi else None,
        mask=None,
        scales=shaped((items, 8, scale_rows, build.block), jnp.float32) if scaled else None,
        fresh=None,
        pages=shaped((items * width + 1, heads, page_size, lanes), dtype),
    )


KERNELS = {"int8_matmul": int8_matmul, "jax_matmul": jax_matmul, "paged_attention": paged_attention}


def main(arguments: list[str]) -> None:
    """Prints the estimate of the case given as JSON."""
    if arguments[0] == "--child":
        case = json.loads(arguments[1])
        found = KERNELS[case["kernel"]](case)
    else:
        found = estimate(json.loads(arguments[0]))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
