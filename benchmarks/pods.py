"""Compiles whole steps for pod slices that are not here, with the hosts that such a slice has.

    python benchmarks/pods.py --json                     # what was compiled, from the results
    python benchmarks/pods.py --out benchmarks/results/pods.json

Each row is a decode or prefill step of every layer, compiled ahead of time by the TPU's own
compiler: memory of one chip, collectives by kind and axes, how the chips belong to hosts, and
whether anything leaves the slice. Nothing here was run on a TPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "pods.json"
CONTEXT = 1024
LENGTHS = {"decode": 1, "prefill": 256}
LEAVES_THE_SLICE = ("megascale", "dcn")
"""Words of programs that send over the data centre's network."""


@dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
        mesh: devices along x, y and z.
        chip_gb: memory of a chip.
    """

    model: str
    slice: str
    mesh: tuple[int, int, int]
    chip_gb: int
    batch: int
    prefill_batch: int
    chip_config: str | None = None


CASES = (
    Case("llama-3-70b", "v5e:4x4", (4, 2, 2), 16, 32, 4),
    Case("llama-3-70b", "v6e:2x4", (2, 2, 2), 32, 32, 4),
    Case("palm-540b", "v4:4x4x4", (4, 4, 4), 32, 64, 4, "megacore"),
)


def measure(case: Case, phase: str) -> dict[str, Any]:
    """Returns what the compiler made of a step."""
    from jaxserve.models.named import named_config
    from jaxserve.partitioning.hlo import collectives
    from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
    from jaxserve.partitioning.mesh import MeshPlan, network_axes_of
    from jaxserve.planner.lower import Job, compiled, lower
    from jaxserve.planner.topology import Slice

    where = Slice(case.slice, MeshPlan(*case.mesh), case.chip_config)
    batch = case.batch if phase == "decode" else case.prefill_batch
    heads = Heads.BATCH if phase == "decode" else Heads.HEADS
    layout = PhaseLayout(Ffn.WS2D, heads)
    job = Job(named_config(case.model), layout, batch, CONTEXT, LENGTHS[phase])
    mesh = where.mesh()
    program = compiled(lower(job, mesh))
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None and memory is not None
    devices = list(mesh.devices.flat)
    taken = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
    sent = {f"{one.kind} over {','.join(one.axes)}" for one in collectives(text, where.sizes)}
    return {
        "model": case.model,
        "slice": case.slice,
        "phase": phase,
        "layout": f"ws2d/{heads.value}",
        "mesh": where.sizes,
        "batch": batch,
        "tokens": job.step.tokens,
        "context": CONTEXT,
        "hosts": len({device.process_index for device in devices}),
        "slices": len({getattr(device, "slice_index", 0) or 0 for device in devices}),
        "axes_between_hosts": list(network_axes_of(mesh.devices)),
        "collectives": sorted(sent),
        "leaves_the_slice": any(word in text.lower() for word in LEAVES_THE_SLICE),
        "argument_gb": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 2),
        "chip_gb": case.chip_gb,
        "fits": taken < case.chip_gb,
        "versions": {"jax": version("jax"), "libtpu": version("libtpu")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Compiles what is missing in the results, or prints them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print what was compiled")
    parser.add_argument("--out", type=Path, default=RESULTS, help="keep the rows here")
    parser.add_argument("--model", choices=[case.model for case in CASES])
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if not options.json:
        known = {(row["model"], row["slice"], row["phase"]) for row in rows}
        for case in CASES:
            for phase in LENGTHS:
                wanted = options.model in (None, case.model)
                if wanted and (case.model, case.slice, phase) not in known:
                    rows.append(measure(case, phase))
                    options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                    print(case.model, case.slice, phase, file=sys.stderr)
    print(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
