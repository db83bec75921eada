"""Communication that layouts predict beside what TPU compilers make of them, with no TPU.

    python benchmarks/collectives.py --json                         # every row, from the results
    python benchmarks/collectives.py --slice v5e:8x8 --model llama-2-70b --phase decode

Without --json or --table, rows that are missing are compiled in child processes, one group of rows
each, and kept as they come: a run that is cut short goes on where it stopped; --fresh compiles
kept ones again. Each row says which versions of JAX and libtpu compiled it. With --json or --table
nothing is compiled: a row that was not has what is predicted alone.
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


def model_on(model: str, name: str, ffn: str) -> Any:
    """Returns a model with the layers that a slice can hold; a layer sends the same."""
    from jaxserve.models.named import named_config

    config = named_config(model)
    if (model, name) != ("palm-540b", "v5e:8x8"):
        return config
    # 64 chips of 16 GB do not hold 540B parameters in bfloat16, and less beside gathered layers.
    part = 4 if ffn == "wg-xyz" else 2
    return replace(config, layers=config.layers[: config.num_layers // part])


def config_of(row: Row) -> Any:
    """Returns the model of a row."""
    return model_on(row.model, row.slice, row.ffn)


def job_of(row: Row) -> Any:
    """Returns the step of a row, and its slice."""
    from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
    from jaxserve.planner.lower import Job
    from jaxserve.planner.topology import SLICES as KNOWN

    phase = PhaseLayout(Ffn(row.ffn), Heads(row.heads))
    return Job(config_of(row), phase, BATCH, CONTEXT, LENGTHS[row.phase]), KNOWN[row.slice]


def named(sums: dict[Any, Any]) -> dict[str, Any]:
    """Returns bytes of full tensors by words instead of tuples."""
    return {
        f"{where} {kind} {''.join(axes)} {dtype}": size
        for (kind, axes, dtype, where), size in sorted(sums.items())
    }


def sent_by(row: Row) -> list[Any]:
    """Returns the collectives that are derived for a row."""
    from jaxserve.partitioning.cost import padded, step_collectives

    job, on = job_of(row)
    config = padded(job.config, job.padding(on.sizes))
    return step_collectives(config, job.phase, on.sizes, job.step)


def predicted(row: Row) -> dict[str, Any]:
    """Returns what is known of a row before it is compiled."""
    from jaxserve.partitioning.cost import Where, padded, totals
    from jaxserve.planner.lower import argument_bytes

    job, on = job_of(row)
    config = padded(job.config, job.padding(on.sizes))
    sent = sent_by(row)
    wire = {
        where: sum(one.wire_bytes(on.sizes) for one in sent if one.where is where)
        for where in (Where.LAYER, Where.ENDS)
    }
    return {
        **asdict(row),
        "tokens": job.step.tokens,
        "layers": config.num_layers,
        "query_heads": config_of(row).layers[0].attention.num_heads,
        "query_heads_computed": config.layers[0].attention.num_heads,
        "mesh": on.sizes,
        "layer_wire_bytes": wire[Where.LAYER],
        "ends_wire_bytes": wire[Where.ENDS],
        "full_tensor_bytes": named(totals(sent)),
        "planned_bytes": argument_bytes(job, on.sizes),
        "estimated_temp_bytes": temporary_bytes(row),
    }


def temporary_bytes(row: Row) -> int:
    """Returns what the planner takes a chip to hold beside weights and cache."""
    from jaxserve.partitioning.hardware import slice_of
    from jaxserve.partitioning.memory import Kept, memory_of
    from jaxserve.partitioning.work import Share

    job, on = job_of(row)
    share = Share.of(job.config, job.phase, on.sizes)
    memory = memory_of(
        share, slice_of(row.slice), Kept(), batch=BATCH, context=CONTEXT, new=job.length
    )
    return int(memory.gathered_bytes + memory.activation_bytes)


def measure(row: Row) -> dict[str, Any]:
    """Returns a compiled row."""
    from jaxserve.partitioning.cost import Where
    from jaxserve.planner.check import check

    report = check(*job_of(row))
    return {
        **predicted(row),
        "exact": report.exact,
        "layer_wire_bytes_compiled": report.wire("compiled"),
        "ends_wire_bytes_compiled": report.wire("compiled", Where.ENDS),
        "full_tensor_bytes_compiled": named(report.compiled),
        "copies": list(report.copies),
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
    if child.returncode:
        names = " ".join(asdict(group[0]).values())
        sys.exit(f"the child that compiled the group of {names} ended with {child.returncode}")


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


def held(row: dict[str, Any]) -> float:
    """Returns what a chip holds, over the plan."""
    planned = row["planned_bytes"] + row["estimated_temp_bytes"]
    return (row["argument_bytes"] + row["temp_bytes"]) / planned


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns counts of rows, and each row that is not as predicted."""
    good = [row for row in found if row.get("exact")]
    ratios = sorted(map(held, good))
    return {
        "rows": len(found),
        "exact": len(good),
        "not_compiled": sum("versions" not in row for row in found),
        "padded_heads_exact": sum(
            row["query_heads"] != row["query_heads_computed"] for row in good
        ),
        "memory_within_3_percent": sum(0.97 <= ratio <= 1.03 for ratio in ratios),
        "memory_over_plan": [round(ratio, 3) for ratio in (ratios[:1] + ratios[-1:])],
        "memory_apart": [
            (*key(row), round(held(row), 3)) for row in good if not 0.97 <= held(row) <= 1.03
        ],
        "slowest_compile_cpu_s": max((row.get("compile_cpu_s", 0) for row in good), default=0),
        "with_copies": [key(row) for row in good if row["copies"]],
        "not_exact": [key(row) for row in found if row.get("exact") is False],
        "failed": [(*key(row), row["error"]) for row in found if "error" in row],
    }


def printed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what --json prints."""
    return {"summary": summary(found), "rows": found}


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the MB that a chip receives in a layer, by mesh: slices of one mesh have the same.

    Marks say on how many of the mesh's slices the compiled program has exactly these bytes, if not
    on all of them.
    """
    cells: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in found:
        if "error" in row:
            continue
        mesh = "x".join(map(str, row["mesh"].values()))
        line = row["phase"], mesh, row["model"], row["ffn"]
        cells.setdefault(line, {}).setdefault(row["heads"], []).append(row)
    for phase in dict.fromkeys(line[0] for line in cells):
        yield f"\n{phase}:\n"
        yield f"| mesh | model | layout | {' | '.join(HEADS)} |"
        yield "|---" * (3 + len(HEADS)) + "|"
        for line, by_heads in cells.items():
            if line[0] == phase:
                values = [_cell(by_heads.get(name, [])) for name in HEADS]
                yield f"| {' | '.join([*line[1:], *values])} |"


def _cell(rows_: list[dict[str, Any]]) -> str:
    if not rows_:
        return ""
    exact = sum(bool(row.get("exact")) for row in rows_)
    mark = "" if exact == len(rows_) else f" ({exact} of {len(rows_)})"
    return f"{rows_[0]['layer_wire_bytes'] / 1e6:.3f}{mark}"


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
    if args.json or args.table:
        asked = [found.get(key(asdict(row))) or predicted(row) for row in wanted]
        print("\n".join(tables(asked)) if args.table else json.dumps(printed(asked)))
        return
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
    for row in asked:
        wire = row.get("layer_wire_bytes", 0) / 1e6
        print(*key(row), f"{wire:10.3f} MB a layer", row.get("exact", row.get("error")))
    print(json.dumps(summary(asked)))


if __name__ == "__main__":
    main()
