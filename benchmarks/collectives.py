"""Communication that layouts predict beside what TPU compilers make of them, with no TPU.

    python benchmarks/collectives.py --json                         # every row, from the results
    python benchmarks/collectives.py --slice v5e:8x8 --model llama-2-70b --phase decode

Rows are compiled in child processes, one group of rows each, and kept as they come: a run that is
cut short goes on where it stopped. Kept rows are printed as they are, with the versions of JAX and
libtpu that they were compiled with; --fresh compiles them again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "collectives.json"
SLICES = ("v4:4x4x4", "v5p:4x4x4", "v5e:8x8", "v6e:8x8")
MODELS = ("palm-540b", "llama-2-70b", "falcon-40b")
FFN = ("ws1d", "ws2d", "wg-x", "wg-xy", "wg-xyz")
HEADS = ("heads", "heads-batch", "heads-batch-xy", "batch", "sequence")
BATCH = 64
CONTEXT = 1024
LENGTHS = {"decode": 1, "prefill": 32, "long-prefill": 1024}
"""Tokens of each of the sequences."""


@dataclass(frozen=True)
class Row:
    """A step to compile."""

    slice: str
    model: str
    phase: str
    ffn: str
    heads: str


def rows(args: argparse.Namespace) -> list[Row]:
    """Returns the rows asked for."""
    choice = args.slice or SLICES, args.model or MODELS, args.phase or ("decode", "prefill")
    return [Row(*parts) for parts in product(*choice, args.ffn or FFN, args.heads or HEADS)]


def versions() -> dict[str, str]:
    return {"jax": version("jax"), "libtpu": version("libtpu"), "python": platform.python_version()}


def config_of(row: Row) -> Any:
    """Returns the model, with layers that the slice can hold; a layer sends the same."""
    from jaxserve.models.named import named_config

    config = named_config(row.model)
    if (row.model, row.slice) != ("palm-540b", "v5e:8x8"):
        return config
    # 64 chips of 16 GB do not hold 540B parameters in bfloat16.
    return replace(config, layers=config.layers[: config.num_layers // 2])


def measure(row: Row) -> dict[str, Any]:
    """Returns a compiled row."""
    from jaxserve.partitioning.cost import Where
    from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
    from jaxserve.planner.check import check
    from jaxserve.planner.lower import Job
    from jaxserve.planner.topology import SLICES as KNOWN

    config, length = config_of(row), LENGTHS[row.phase]
    phase = PhaseLayout(Ffn(row.ffn), Heads(row.heads))
    report = check(Job(config, phase, BATCH, CONTEXT, length), KNOWN[row.slice])
    named = {
        side: {
            f"{where} {kind} {''.join(axes)} {dtype}": size
            for (kind, axes, dtype, where), size in sorted(getattr(report, side).items())
        }
        for side in ("predicted", "compiled")
    }
    return {
        **asdict(row),
        "tokens": BATCH * length,
        "layers": config.num_layers,
        "heads_computed": report.num_heads,
        "mesh": dict(report.sizes),
        "exact": report.exact,
        "layer_wire_bytes": report.wire("predicted"),
        "layer_wire_bytes_compiled": report.wire("compiled"),
        "ends_wire_bytes": report.wire("predicted", Where.ENDS),
        "ends_wire_bytes_compiled": report.wire("compiled", Where.ENDS),
        "full_tensor_bytes": named["predicted"],
        **({} if report.exact else {"full_tensor_bytes_compiled": named["compiled"]}),
        "copies": list(report.copies),
        "planned_bytes": report.planned_bytes,
        "gathered_bytes": report.gathered_bytes,
        "argument_bytes": report.argument_bytes,
        "temp_bytes": report.temp_bytes,
        "compile_s": round(report.compile_s, 1),
        "compile_cpu_s": round(report.cpu_s, 1),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def work() -> None:
    """Compiles the rows that come on stdin, one JSON object a line."""
    for line in sys.stdin:
        row = Row(**json.loads(line))
        try:
            found = measure(row)
        except Exception as error:  # one row that does not fit a chip must not end the others
            found = {**asdict(row), "error": f"{type(error).__name__}: {error}"[:400]}
            found |= {"versions": versions(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
        print(json.dumps(found), flush=True)


def compiled(group: list[Row]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a group as a child process finishes them."""
    quiet = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.collectives", "--child"],
        cwd=Path(__file__).parents[1],
        env=os.environ | quiet,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        child.stdin.write("".join(json.dumps(asdict(row)) + "\n" for row in group))
        child.stdin.close()
        yield from map(json.loads, child.stdout)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("slice", "model", "phase", "ffn", "heads"))


def load(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Returns the rows that were kept, by what was compiled."""
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    return {key(row): row for row in kept}


def save(path: Path, found: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """Writes the rows, one a line."""
    lines = ",\n".join(json.dumps(found[name]) for name in sorted(found))
    partial = path.with_suffix(".part")
    partial.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    partial.replace(path)


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns counts of rows, and each row that is not as predicted."""
    good = [row for row in found if row.get("exact")]
    return {
        "rows": len(found),
        "exact": len(good),
        "with_copies": sum(bool(row["copies"]) for row in good),
        "not_exact": [key(row) for row in found if row.get("exact") is False],
        "failed": [(*key(row), row["error"]) for row in found if "error" in row],
    }


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the bytes that a chip receives in a layer, in MB; starred where compiled differs."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found:
        mark = "" if row.get("exact") else "*"
        wire = row.get("layer_wire_bytes")
        text = "failed" if wire is None else f"{wire / 1e6:.3f}{mark}"
        line = row["phase"], row["slice"], row["model"], row["ffn"]
        cells.setdefault(line, {})[row["heads"]] = text
    for phase in dict.fromkeys(line[0] for line in cells):
        yield f"\n{phase}:\n"
        yield f"| slice | model | layout | {' | '.join(HEADS)} |"
        yield "|---" * (3 + len(HEADS)) + "|"
        for line, found_heads in cells.items():
            if line[0] == phase:
                values = [found_heads.get(name, "") for name in HEADS]
                yield f"| {' | '.join([*line[1:], *values])} |"


def main() -> None:
    """Compiles what is missing and prints the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, choices in (
        ("slice", SLICES),
        ("model", MODELS),
        ("phase", tuple(LENGTHS)),
        ("ffn", FFN),
        ("heads", HEADS),
    ):
        parser.add_argument(f"--{name}", choices=choices, action="append", help="may be repeated")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that keeps the rows")
    parser.add_argument("--table", action="store_true", help="print tables in Markdown")
    parser.add_argument("--fresh", action="store_true", help="compile rows again that are kept")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return work()
    wanted = rows(args)
    found = load(args.out)
    missing = [row for row in wanted if args.fresh or key(asdict(row)) not in found]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in missing:
        groups.setdefault((row.phase, row.slice, row.model), []).append(row)
    for group in groups.values():
        for row in compiled(group):
            found[key(row)] = row
            save(args.out, found)
            print(*key(row), row.get("exact", row.get("error")), file=sys.stderr, flush=True)
    asked = [found[key(asdict(row))] for row in wanted if key(asdict(row)) in found]
    if args.table:
        print("\n".join(tables(asked)))
        return
    if args.json:
        print(json.dumps({"summary": summary(asked), "rows": asked}))
        return
    for row in asked:
        wire = row.get("layer_wire_bytes", 0) / 1e6
        print(*key(row), f"{wire:10.3f} MB a layer", row.get("exact", row.get("error")))
    print(json.dumps(summary(asked)))


if __name__ == "__main__":
    main()
