"""Compiles the steps that an engine runs, for slices of TPUs that are not here.

    python benchmarks/engine_steps.py --json             # what was compiled, from the results
    python benchmarks/engine_steps.py                    # compiles what is missing there

Each row is a whole step of every layer, decode or prompts beside decode, as the engine's own runner
makes it, compiled ahead of time by the TPU's own compiler: collectives and memory of one chip
beside the plan, copies of weights and pages, how the chips belong to hosts, and what the program
exchanges with anything outside of the slice. Nothing here was run on a TPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "engine_steps.json"
STEPS = ("decode", "mixed")
SEQUENCES, STEP_TOKENS, PAGE_SIZE, KV_BYTES = 128, 1024, 128, 3_000_000_000
OUTSIDE = re.compile(r"is_host_transfer=true|= \S+ (?:infeed|outfeed)\(|megascale|dcn", re.I)
"""Marks of what leaves the chips of a slice."""


@dataclass(frozen=True)
class Case:
    """A model on a slice, and its layouts.

    Attributes:
        mesh: devices along x, y and z.
    """

    model: str
    slice: str
    mesh: tuple[int, int, int]
    prefill: str = "ws2d"
    decode: str = "ws2d"
    heads: str = "batch"
    quantize: str | None = None

    def __str__(self) -> str:
        mesh, weights = ",".join(map(str, self.mesh)), self.quantize or "bfloat16"
        layout = f"{self.prefill} and {self.decode} by {self.heads}"
        return f"{self.model} in {weights} on {self.slice} as {mesh}, {layout}"


PODS = (
    Case("llama-3-70b", "v5e:4x4", (4, 2, 2)),
    Case("llama-3-70b", "v5e:4x4", (4, 2, 2), quantize="int8"),
    Case("llama-3-70b", "v6e:2x4", (2, 2, 2)),
    Case("palm-540b", "v4:4x4x4", (4, 4, 4)),
)
"""What docs/pods.md walks through."""

MESHES = {"v4:4x4x4": (4, 4, 4), "v5p:4x4x4": (4, 4, 4), "v5e:8x8": (4, 2, 8), "v6e:8x8": (4, 2, 8)}
MODELS = ("llama-2-70b", "falcon-40b", "palm-540b")
LAYOUTS = (("ws2d", "ws2d", "batch"), ("ws2d", "ws2d", "heads"), ("wg-xyz", "ws2d", "batch"))
CASES = tuple(
    dict.fromkeys(
        [
            *PODS,
            *(
                Case(model, name, mesh, *layout)
                for (name, mesh), model, layout in product(MESHES.items(), MODELS, LAYOUTS)
            ),
        ]
    )
)


def measure(case: Case, step: str) -> dict[str, Any]:
    """Returns what the compiler made of a step."""
    from benchmarks.collectives import model_on, named
    from jaxserve.config import Quantization
    from jaxserve.partitioning.hardware import slice_of
    from jaxserve.partitioning.layout_file import choose
    from jaxserve.partitioning.mesh import MeshPlan, network_axes_of
    from jaxserve.planner.engine_step import check_step, engine_on
    from jaxserve.planner.topology import Slice
    from jaxserve.serving.options import EngineOptions

    config = model_on(case.model, case.slice, case.prefill)
    on = Slice(case.slice, MeshPlan(*case.mesh), "megacore" if "v4" in case.slice else None)
    layout = choose(
        config,
        "bfloat16",
        mesh=on.plan,
        layout=case.decode,
        prefill_layout=case.prefill,
        attention=case.heads,
    )
    assert layout is not None
    options = EngineOptions(
        max_sequences=SEQUENCES,
        max_step_tokens=STEP_TOKENS,
        page_size=PAGE_SIZE,
        kv_bytes=KV_BYTES,
    )
    quantize = None if case.quantize is None else Quantization(case.quantize)
    runner = engine_on(on, config, layout, options, quantize).runner
    shapes = runner.ladder.shapes()
    shape = [one for one in shapes if one.decode_only][-1] if step == "decode" else shapes[-1]
    report = check_step(runner, shape)
    mesh = runner.program.mesh
    assert mesh is not None
    devices = list(mesh.devices.flat)
    return {
        "model": case.model,
        "slice": case.slice,
        "mesh": on.sizes,
        "layout": str(layout),
        "weights": case.quantize or "bfloat16",
        "step": step,
        "layers": config.num_layers,
        "tokens": report.tokens,
        "rows": report.rows,
        "exact": report.exact,
        "differing": named(report.differing),
        "sent": named(report.compiled),
        "copies": list(report.copies),
        "planned_bytes": report.planned_bytes,
        "argument_bytes": report.argument_bytes,
        "temp_bytes": report.temp_bytes,
        "chip_bytes": int(slice_of(case.slice).device_hbm_bytes),
        "hosts": len({device.process_index for device in devices}),
        "slices": len({getattr(device, "slice_index", 0) or 0 for device in devices}),
        "axes_between_hosts": list(network_axes_of(mesh.devices)),
        "leaves_the_slice": sorted(set(OUTSIDE.findall(report.text))),
        "compile_s": round(report.compile_s, 1),
        "versions": {"jax": version("jax"), "libtpu": version("libtpu")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Compiles what is missing in the results, or prints them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print what was compiled")
    parser.add_argument("--out", type=Path, default=RESULTS, help="keep the rows here")
    parser.add_argument("--model", choices=sorted({case.model for case in CASES}))
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if not options.json:
        known = {row["case"] for row in rows}
        for case, step in product(CASES, STEPS):
            if options.model in (None, case.model) and f"{case}: {step}" not in known:
                rows.append({"case": f"{case}: {step}", **measure(case, step)})
                options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print(rows[-1]["case"], rows[-1]["exact"], rows[-1]["copies"], file=sys.stderr)
    print(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
