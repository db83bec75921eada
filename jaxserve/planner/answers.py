"""What a planner answers: objects that show themselves in a terminal, a notebook and as JSON.

plan.fields()        # plain values
print(plan)          # a table; in a notebook, `plan` alone
plan.save("out")     # report.html, report.png, plan.json, layout.json, ...
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType

from jaxserve.config import KvDtype, ModelConfig, Quantization
from jaxserve.errors import UsageError
from jaxserve.partitioning.dtypes import Several, Stored
from jaxserve.partitioning.estimate import Coster, Estimate, Term, band
from jaxserve.partitioning.found import Candidate, Found, Verdict
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.layout import Heads
from jaxserve.partitioning.layout_file import Buckets, Dtypes, Layout, model_digest
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.planner import show


class _Shown:
    """An answer that rich and notebooks draw; it has `__rich__`."""

    __rich__: Callable[[], RenderableType]

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, highlight=False).print(self.__rich__())
        return out.getvalue().rstrip()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=110, highlight=False)
        console.print(self.__rich__())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


@dataclass(frozen=True)
class StepPlan(_Shown):
    """The estimate of one step.

    Attributes:
        model: as it was named.
        config: its architecture.
        coster: layout, mesh and slice.
        phase: "prefill" or "decode".
        batch, new, context: sequences, tokens of each in the step and before it.
    """

    model: str
    config: ModelConfig = field(repr=False)
    coster: Coster = field(repr=False)
    phase: str
    batch: int
    new: int
    context: int

    @cached_property
    def estimate(self) -> Estimate:
        """Returns the estimate."""
        return self.coster.estimate(self.batch, self.new, self.context)

    @property
    def rank(self) -> tuple[bool, float]:
        """Returns what is to be least: what fits comes first, then what is fast."""
        return not self.estimate.fits, float(self.estimate.time_s)

    @property
    def mesh(self) -> MeshPlan:
        """Returns the mesh."""
        return MeshPlan(**dict(self.coster.network.sizes))

    def fields(self) -> dict[str, Any]:
        """Returns the answer as JSON shows it."""
        found, kept = self.estimate, self.coster.kept
        return {
            "model": self.model,
            "slice": found.on.name,
            "mesh": str(self.mesh),
            "phase": self.phase,
            "layout": str(self.coster.share.phase.ffn),
            "attention": str(self.coster.share.phase.heads),
            "weights": kept.weights.name,
            "kv": kept.kv.name,
            "batch": self.batch,
            "context": self.context + (self.new if self.phase == "prefill" else 0),
            "estimate": True,
            "time_s": float(found.time_s),
            "band": found.band,
            "mfu": float(found.mfu),
            "fits": bool(found.fits),
            "memory": memory_fields(found),
            "terms": [term_fields(term) for term in found.terms],
        }

    def __rich__(self) -> RenderableType:
        return show.step(self)

    __str__ = _Shown.__str__


@dataclass(frozen=True)
class Room(_Shown):
    """The longest context that a share of memory holds.

    Attributes:
        on, mesh, attention: where, and how the cache is cut.
        batch: sequences.
        hbm_fraction, budget_bytes: share of a device's memory for keys and values.
        max_context_tokens: the answer.
    """

    on: ChipSlice
    mesh: MeshPlan
    attention: Heads
    batch: int
    hbm_fraction: float
    budget_bytes: float
    max_context_tokens: int

    def fields(self) -> dict[str, Any]:
        """Returns the answer as JSON shows it."""
        return {
            "slice": self.on.name,
            "mesh": str(self.mesh),
            "attention": str(self.attention),
            "batch": self.batch,
            "hbm_fraction": self.hbm_fraction,
            "budget_bytes": self.budget_bytes,
            "max_context_tokens": self.max_context_tokens,
            "estimate": False,
            "band": 0.0,  # a count of bytes
        }

    def __rich__(self) -> RenderableType:
        return show.room(self)

    __str__ = _Shown.__str__


@dataclass(frozen=True)
class Plan(_Shown):
    """The answer of a search.

    Attributes:
        model: as it was named.
        found: what was found.
    """

    model: str
    found: Found

    @property
    def best(self) -> Candidate:
        """Returns the best deployment.

        Raises:
            UsageError: there is none; the message says why.
        """
        if self.found.verdict is not Verdict.OK:
            raise UsageError(f"{self.model} on {self.found.on}: {self.found.why}")
        return self.found.best[0]

    @cached_property
    def steps(self) -> dict[str, Estimate]:
        """Returns the estimates of the best deployment's prefill and decode steps."""
        return self.best.steps(self.found.config, self.found.demand)

    @property
    def layout(self) -> Layout | None:
        """Returns the best deployment's layout; None where the runtime cannot run it."""
        best = self.best
        option = best.option
        if option.not_run():
            return None
        return Layout(
            model=model_digest(self.found.config),
            mesh=option.mesh,
            prefill=option.prefill,
            decode=option.decode,
            dtypes=Dtypes(_plain(option.kept.weights), "bfloat16", _plain(option.kept.kv)),
            buckets=Buckets(best.batch, self.step_tokens),
        )

    @property
    def step_tokens(self) -> int:
        """Returns the most tokens of a server's step: prompts, or each sequence and one more."""
        return max(self.best.chunk * self.best.group, 512, self.best.batch + 1)

    @property
    def quantize(self) -> Quantization | None:
        """Returns how weights are rounded, which is said beside the layout."""
        return Quantization.INT8 if self.best.option.kept.weights.name == "int8" else None

    @property
    def kv_dtype(self) -> KvDtype | None:
        """Returns how keys and values are rounded, which is said beside the layout."""
        name = self.best.option.kept.kv.name
        return KvDtype(name) if name in tuple(KvDtype) else None

    @property
    def rounding(self) -> tuple[str, ...]:
        """Returns the options of a server that say so."""
        kv = self.kv_dtype and f"--kv-dtype={self.kv_dtype.short}"
        return tuple(filter(None, (self.quantize and f"--quantize={self.quantize}", kv)))

    def fields(self) -> dict[str, Any]:
        """Returns the answer as JSON shows it."""
        found, demand = self.found, self.found.demand
        fields: dict[str, Any] = {
            "model": self.model,
            "slice": found.on.name,
            "input_tokens": demand.input_tokens,
            "output_tokens": demand.output_tokens,
            "ttft_s": demand.ttft_s,
            "tpot_s": demand.tpot_s,
            "rate": demand.rate,
            "objective": str(demand.objective),
            "estimate": True,
            "band": band(found.on),
            "verdict": str(found.verdict),
            "short": found.short,
            "why": found.why,
            "priced": found.priced,
            "best": [candidate_fields(one) for one in found.best],
            "front": [candidate_fields(one) for one in found.front],
        }
        if found.nearest is not None:
            fields["nearest"] = candidate_fields(found.nearest)
        if found.verdict is Verdict.OK:
            fields["steps"] = {
                name: {
                    "time_s": float(step.time_s),
                    "mfu": float(step.mfu),
                    "memory": memory_fields(step),
                    "terms": [term_fields(term) for term in step.terms],
                }
                for name, step in self.steps.items()
            }
        return fields

    def csv(self) -> str:
        """Returns the best and the front as a table of comma-separated values."""
        rows = [
            {"set": name, **candidate_fields(one)}
            for name, group in (("best", self.found.best), ("front", self.found.front))
            for one in group
        ]
        out = io.StringIO()
        if rows:
            writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: "; ".join(v) if k == "not_run" else v for k, v in row.items()})
        return out.getvalue()

    def save(self, folder: str | Path, checkpoint: str | None = None) -> list[Path]:
        """Writes everything into a folder, and returns the files.

        What serves the plan is left out where the runtime cannot run it: layout, manifest, script.

        Args:
            checkpoint: where servers find the weights; see `manifest.served_model`.

        Raises:
            UsageError: there is no answer to save, the folder cannot be written, or the checkpoint
                is no absolute path.
            UnsupportedError: matplotlib is missing.
        """
        from jaxserve.planner.manifest import benchmark_script, deployment
        from jaxserve.planner.report import check_installed, html, pictures

        check_installed()
        texts = {
            "plan.json": json.dumps(self.fields(), indent=2) + "\n",
            "candidates.csv": self.csv(),
            "report.html": html(self),
        }
        if (layout := self.layout) is not None:
            texts |= deployment(self, checkpoint)
            texts["benchmark.sh"] = benchmark_script(self, checkpoint)
            texts["layout.json"] = layout.text()
            if "kubernetes.yaml" not in texts:  # kustomize reads what lies in its folder
                texts["pods/layout.json"] = layout.text()
        target = Path(folder)
        try:
            for name, text in texts.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error}") from error
        files = [target / name for name in texts]
        return [*files, *pictures(self, target)]

    def __rich__(self) -> RenderableType:
        return show.plan(self)

    def explained(self) -> RenderableType:
        """Returns the table with the terms of both steps below it."""
        steps = self.steps
        return Group(
            show.plan(self), *(show.terms(f"{name} step", step) for name, step in steps.items())
        )

    __str__ = _Shown.__str__


def candidate_fields(one: Candidate) -> dict[str, Any]:
    """Returns a deployment as JSON shows it."""
    option = one.option
    return {
        "replicas": option.replicas,
        "stages": option.stages,
        "slice": option.part.name,
        "mesh": str(option.mesh),
        "prefill": str(option.prefill),
        "decode": str(option.decode),
        "weights": option.kept.weights.name,
        "kv": option.kept.kv.name,
        "serving": str(option.serving),
        "prefill_replicas": option.prefill_replicas,
        "prefill_slice": option.prefill_part.name,
        "batch": one.batch,
        "group": one.group,
        "chunk": one.chunk,
        "ttft_s": one.ttft_s,
        "tpot_s": one.tpot_s,
        "tokens_per_s": one.tokens_per_s,
        "requests_per_s": one.requests_per_s,
        "usd_per_million": one.usd_per_million,
        "free_bytes": one.free_bytes,
        "not_run": option.not_run(),
    }


def term_fields(term: Term) -> dict[str, Any]:
    """Returns a term as JSON shows it."""
    return {
        "name": term.name,
        "kind": str(term.part),
        "amount": float(term.amount),
        "unit": term.unit,
        "seconds": float(term.seconds),
        "origin": str(term.origin),
        "note": term.remark,
    }


def memory_fields(found: Estimate) -> dict[str, float]:
    """Returns a step's memory as JSON shows it."""
    memory = found.memory
    fields = {name: float(value) for name, value in vars(memory).items()}
    return fields | {"total_bytes": float(memory.total_bytes), "free_bytes": memory.free_bytes}


def _plain(kept: Stored | Several) -> str:
    """Returns the dtype that something is computed with, which a layout names."""
    return "bfloat16" if kept.bits == 8 else kept.name
