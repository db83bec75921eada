"""Products that send pieces beside the work, next to plain ones, as a TPU's compiler sees them.

    python benchmarks/overlap.py                    # compiles for minutes; needs libtpu, no TPU
    python benchmarks/overlap.py --json             # prints what was kept

The last projections of palm-540b, whose activations are gathered over x before the product or
scattered after it. Compute is the compiler's estimate of cycles. Exposed is the time in which its
scheduler has nothing but communication; as it takes products for longer than that estimate, this
is the least. It charges nothing for a reduce-scatter, which is therefore taken as its bytes over
the two links of a ring. Nothing here was run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "overlap.json"
WIDTH, HIDDEN = 18432, 12288 + 73728
CASES = [("v4:4x4x4", tokens) for tokens in (64, 512, 2048, 8192)]
RINGS = ("plain", "one-way", "bidirectional", "low-latency")
RING_GB_S = {"v4:4x4x4": 90.0}
"""Both links of a ring together."""

_SENT = ("all-gather", "collective-permute", "collective-permute-done", "reduce-scatter")


def exposed_cycles(schedule: str) -> tuple[float, float]:
    """Returns (cycles in which communication alone goes on, cycles of a microsecond)."""
    opcode, found, number, start, total = "", {}, "", 0.0, 0.0
    for line in schedule.splitlines():
        name, _, value = line.strip().partition(": ")
        if name == "opcode":
            opcode = value.strip('"')
        elif name == "id":
            found.setdefault(value, opcode)
            number = value
        elif name == "start_timestamp_cycles":
            start = float(value)
        elif name == "end_timestamp_cycles" and found[number] in _SENT:
            total += float(value) - start
    rate = re.search(r"cycles_per_microsecond: ([\d.]+)", schedule)
    assert rate
    return total, float(rate[1])


def estimate(slice_name: str, tokens: int, form: str, ring: str, dump: Path) -> dict[str, Any]:
    """Returns the compiler's estimate of one product."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxserve.partitioning import collective_matmul as forms
    from jaxserve.planner.topology import SLICES

    mesh = SLICES[slice_name].mesh()
    sizes = dict(mesh.shape)
    count, hidden, width = sizes["x"], HIDDEN // (sizes["y"] * sizes["z"]), WIDTH // sizes["x"]
    gathers = form == "all-gather-matmul"
    product = forms.all_gather_matmul if gathers else forms.matmul_reduce_scatter
    # The first gathers the hidden features; the second, of a first projection, scatters them.
    wide, rows = (hidden, width) if gathers else (width, hidden)

    def step(x: Any, w: Any, extra: Any) -> Any:
        # The schedule is written only where something goes on beside other work.
        hop = lax.ppermute(extra, "x", [(i, (i + 1) % count) for i in range(count)])
        return product(x, w, "x", forms.Ring(ring)), hop

    cut, whole = PartitionSpec(None, "x"), PartitionSpec(None, None)
    first, last = PartitionSpec("x"), (whole if gathers else cut)
    given = [
        ((tokens, wide), cut if gathers else whole),
        ((wide, rows), whole),
        ((1024 * count,), first),
    ]
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=tuple(s for _, s in given), out_specs=(last, first),
        check_vma=False,
    )  # fmt: skip
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in given
    ]
    text = jax.jit(mapped).lower(*arrays).compile().as_text()
    assert text is not None
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    exposed, rate = exposed_cycles((dump / "jit_step.schedule.txt").read_text())
    exposed_us = exposed / rate
    if form == "matmul-reduce-scatter" and ring == "plain":
        sent = tokens * hidden * 2 * (count - 1) / count
        exposed_us += sent / RING_GB_S[slice_name] / 1e3
    return {
        "slice": slice_name,
        "form": form,
        "tokens": tokens,
        "ring": ring,
        "compute_us": round(cycles / rate, 1),
        "exposed_us": round(exposed_us, 1),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def measured() -> Iterator[dict[str, Any]]:
    """Yields the estimates of all cases."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f" --xla_dump_to={folder} --xla_dump_latency_hiding_schedule=true"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        one = partial(estimate, dump=Path(folder))
        for form in ("all-gather-matmul", "matmul-reduce-scatter"):
            for slice_name, tokens in CASES:
                for ring in RINGS:
                    yield one(slice_name, tokens, form, ring)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a line of Markdown for each product: compute + exposed, and plain over the best."""
    yield f"| product | T | {' | '.join(RINGS)} | plain over the best |"
    yield "|---" * (3 + len(RINGS)) + "|"
    for form, tokens in dict.fromkeys((row["form"], row["tokens"]) for row in rows):
        own = {r["ring"]: r for r in rows if (r["form"], r["tokens"]) == (form, tokens)}
        cells = [f"{own[r]['compute_us']:g} + {own[r]['exposed_us']:g}" for r in RINGS]
        whole = {r: own[r]["compute_us"] + own[r]["exposed_us"] for r in RINGS}
        gain = whole["plain"] / min(whole.values())
        yield f"| {form} | {tokens} | {' | '.join(cells)} | {gain:.2f} |"


def main() -> None:
    """Compiles every case, keeps and prints the estimates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print what was kept, as JSON")
    parser.add_argument("--table", action="store_true", help="print what was kept, in Markdown")
    args = parser.parse_args()
    if not (args.json or args.table):
        lines = ",\n".join(json.dumps(row) for row in measured())
        RESULTS.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    kept = json.loads(RESULTS.read_text())
    print(json.dumps(kept) if args.json else "\n".join(table(kept["rows"])))


if __name__ == "__main__":
    main()
