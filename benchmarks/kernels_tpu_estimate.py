"""What the TPU's compiler makes of our kernels at the shapes of known models; nothing is timed.

    python benchmarks/kernels_tpu_estimate.py --json                  # the committed figures
    python benchmarks/kernels_tpu_estimate.py --run --chip v5e        # estimate what is missing
    python benchmarks/kernels_tpu_estimate.py --tune --chip v5e       # and try other sizes

Decode attention: cycles of the inner loop for a block of keys, as a share of the time that the
block takes from memory. That does not depend on the batch, nor on the context beyond the block.
Matmuls: the larger of cycles and copied bytes, over the roofline. The sizes that come out best go
into `pallas_kernels/tuning.toml`, where the kernels find them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import tpu_cycles  # pyright: ignore[reportMissingImports] - a script beside the package

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels_tpu_estimate.json"
TUNING = ROOT / "pallas_kernels" / "tuning.toml"

ATTENTION = {
    "llama-3-8b": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "llama-3-70b over 8": {"heads": 8, "kv_heads": 1, "head_dim": 128},
    "gemma-2-9b": {"heads": 16, "kv_heads": 8, "head_dim": 256, "soft_cap": 50.0},
    "falcon-7b": {"heads": 71, "kv_heads": 1, "head_dim": 64},
    "llama-3-8b, int8": {"heads": 32, "kv_heads": 8, "head_dim": 128, "pages": "int8"},
}
"""Heads of a layer on one chip."""

MATMUL = {
    "llama-3-8b, up and gate": (4096, 28672),
    "llama-3-70b over 8, down": (3584, 8192),
}
"""(inputs, output channels) of a weight on one chip."""

BLOCK_BYTES = (1 << 21, 1 << 20, 1 << 22)
TILES = {16: ((2048, 2), (1024, 1)), 256: ((1024, 1), (512, 1))}
"""(channels, parts of the contraction) of a block, by rows."""
TARGETS = {"paged_attention": ("of_hbm_time", 0.8), "int8_matmul": ("over_roofline", 1.15)}


def cases(chip: str, tune: bool) -> list[dict[str, Any]]:
    """Returns what to ask the compiler; without tuning only the first size of each shape."""
    found: list[dict[str, Any]] = []
    for model, heads in ATTENTION.items():
        lanes = 128 if heads["head_dim"] <= 64 else 2 * heads["head_dim"]
        for size in BLOCK_BYTES:
            element = 1 if heads.get("pages") == "int8" else 2
            keys = size // (heads["kv_heads"] * lanes * element)
            found.append({"kernel": "paged_attention", "model": model, "keys": keys, **heads})
    for model, (inputs, channels) in MATMUL.items():
        for rows, tiles in TILES.items():
            blocks = [[rows, block, inputs // parts] for block, parts in tiles]
            for tile in blocks:
                shape = {"rows": rows, "inputs": inputs, "channels": channels, "tile": tile}
                for mode in ("w8a16", "w8a8"):
                    found.append({"kernel": "int8_matmul", "model": model, "mode": mode, **shape})
            beside = {"rows": rows, "inputs": inputs, "channels": channels, "tile": blocks[0]}
            found.append({"kernel": "jax_matmul", "model": model, "mode": "bf16", **beside})
    found = [{"chip": chip, **case} for case in found]
    if tune:
        return found
    first: dict[str, dict[str, Any]] = {}
    for case in found:
        first.setdefault(shape_of(case), case)
    return list(first.values())


def shape_of(case: dict[str, Any]) -> str:
    """Returns what a case is about, apart from the sizes that are tried."""
    kept = {name: value for name, value in case.items() if name not in ("keys", "tile")}
    return json.dumps(kept, sort_keys=True)


def versions() -> str:
    names = "jax", "libtpu"
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def read() -> dict[str, Any]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    return {"origin": "compiler-estimated", "versions": versions(), "rows": []}


def run(chip: str, tune: bool) -> None:
    """Estimates the cases that the results do not have, and keeps each as it comes."""
    for case in cases(chip, tune):
        if any(row["case"] == case for row in read()["rows"]):
            continue
        try:
            estimate = tpu_cycles.estimate(case)
        except tpu_cycles.CompilerFailed as error:
            lines = str(error).strip().splitlines()
            estimate = {"refused": lines[-1][:200] if lines else "the compiler aborted"}
        results = read()
        results["rows"].append({"case": case, "estimate": estimate})
        results["rows"].sort(key=lambda row: json.dumps(row["case"], sort_keys=True))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({**case, **estimate}), file=sys.stderr)


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the best row of each shape, of those without spills where there are any."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        name, _ = TARGETS.get(row["case"]["kernel"], ("over_roofline", None))
        if name not in row["estimate"]:
            continue
        key = shape_of(row["case"])
        if key not in found or _rank(row, name) < _rank(found[key], name):
            found[key] = row
    return list(found.values())


def _rank(row: dict[str, Any], name: str) -> tuple[bool, float]:
    return row["estimate"].get("spills", 0) > 0, row["estimate"][name]


def write_tuning(results: dict[str, Any]) -> None:
    """Writes the best sizes of every shape, with their origin."""
    origin = f"{results['origin']} {results['versions']}"
    lines = ["# Sizes of blocks, written by `benchmarks/kernels_tpu_estimate.py --tune`.", ""]
    for row in best(results["rows"]):
        case, estimate = row["case"], row["estimate"]
        if case["kernel"] not in TARGETS:
            continue
        name, _ = TARGETS[case["kernel"]]
        kept = {"chip": case["chip"], "model": case["model"]}
        if case["kernel"] == "paged_attention":
            kept |= {n: case[n] for n in ("heads", "kv_heads", "head_dim")}
            kept |= {"pages": case.get("pages", "bfloat16"), "keys": case["keys"]}
        else:
            kept |= {n: case[n] for n in ("mode", "rows", "inputs", "channels", "tile")}
        kept |= {"spills": estimate["spills"], name: estimate[name], "origin": origin}
        lines.append(f"[[{case['kernel']}]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in kept.items()]
        lines.append("")
    TUNING.write_text("\n".join(lines))


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the best row of each shape beside its target."""
    rows = []
    for row in best(results["rows"]):
        name, target = TARGETS.get(row["case"]["kernel"], ("over_roofline", None))
        met = None if target is None else row["estimate"][name] <= target
        rows.append({**row["case"], **row["estimate"], "target": target, "met": met})
    return {"origin": results["origin"], "versions": results["versions"], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", action="store_true", help="estimate what is missing")
    parser.add_argument("--tune", action="store_true", help="try every size, and keep the best")
    parser.add_argument("--chip", choices=["v5e", "v6e", "v5p"], action="append")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if given.run or given.tune:
        for chip in given.chip or ["v5e", "v6e", "v5p"]:
            run(chip, given.tune)
        write_tuning(read())
    found = summary(read())
    if given.json:
        print(json.dumps(found))
        return
    print(f"{found['origin']}, {found['versions']}")
    for row in found["rows"]:
        share = row.get("of_hbm_time", row.get("over_roofline"))
        sizes = row.get("keys", row.get("tile"))
        rows = row.get("rows", "")
        print(row["chip"], row["kernel"], row["model"], row.get("mode", ""), rows, sizes, share)


if __name__ == "__main__":
    main()
