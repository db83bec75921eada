"""Holds a plan against the compiler of its target: fit, communication and copies.

    checked = verified(plan)           # two compiles in child processes, a minute at most
    checked.check()                    # raises with the term that differs

A step is traced with abstract weights and compiled ahead of time for the slice, which needs libtpu
but no TPU, or for GPUs, which needs the CUDA plugin but no GPU. For a TPU it is the step that the
server runs, made by its own runner; on GPUs, on one chip, and where phases have chips of their own,
that of the functional core. Forced CPU devices stand in for other chips, which shows the kinds of
collectives and their axes alone. A compile that hangs or crashes takes its own process with it, and
what was compiled once is kept by what went in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxserve.compile_cache import directory
from jaxserve.config import KvDtype, ModelConfig, Quantization
from jaxserve.errors import JaxserveError, UnsupportedError
from jaxserve.partitioning.demand import Serving
from jaxserve.partitioning.estimate import Estimate
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.partitioning.layout_file import Layout
from jaxserve.planner.answers import Plan
from jaxserve.planner.gpu_topology import known

LIMIT_S = 600.0
"""Longest time for one compile."""

TOLERANCE = 0.02
"""Share by which bytes of a collective may differ: what a compiler pads."""


COMPILED = ("v4", "v5e", "v5p", "v6e", "tpu7x")
"""Chips that libtpu compiles for, by the names it has for slices."""


class Server(msgspec.Struct, frozen=True):
    """What makes a plan's step that of the server which is to run it.

    Attributes:
        layout: of both phases, with the sizes of the engine.
        kv_bytes: what pages may take of a device, at most.
    """

    layout: Layout
    kv_bytes: int


class Question(msgspec.Struct, frozen=True):
    """A step that a child process compiles.

    Attributes:
        config, phase, mesh: model, layout, devices along x, y and z.
        batch, slots, length, quantize, kv_dtype: see `lower.Job`.
        target: a slice that libtpu knows, or None.
        gpu: a GPU that the CUDA plugin knows, or None; CPU devices are there for neither.
        host_chips: GPUs of a host.
        megacore: the two cores of a chip are one device.
        server: the engine's own step is compiled; None compiles that of the functional core.
    """

    config: ModelConfig
    phase: PhaseLayout
    mesh: tuple[int, int, int]
    batch: int
    slots: int
    length: int
    target: str | None
    gpu: str | None = None
    host_chips: int = 8
    megacore: bool = False
    quantize: Quantization | None = None
    kv_dtype: KvDtype | None = None
    server: Server | None = None

    @property
    def stand_in(self) -> bool:
        """Returns whether CPU devices stand in for the target."""
        return self.target is None and self.gpu is None


@dataclass(frozen=True)
class Step:
    """A compiled step beside its prediction; bytes are of one device.

    Attributes:
        name: "prefill" or "decode".
        on: what it was compiled for.
        exact: whether bytes were compared, or kinds and axes alone.
        predicted, compiled: bytes of full tensors by "kind over axes, dtype, part".
        copies: weights or cache that the program moves about.
        planned_bytes, argument_bytes: weights, cache and tokens, as planned and as compiled.
        estimated_temp_bytes, temp_bytes: everything else.
        beside_bytes: keys and values of sequences that are not in the step.
        device_bytes: the device's memory.
        compile_s: wall time.
        cached: it was compiled before.
    """

    name: str
    on: str
    exact: bool
    predicted: Mapping[str, int]
    compiled: Mapping[str, int]
    copies: tuple[str, ...]
    planned_bytes: int
    argument_bytes: int
    estimated_temp_bytes: int
    temp_bytes: int
    beside_bytes: int
    device_bytes: int
    compile_s: float
    cached: bool = field(default=False, compare=False)

    @property
    def differing(self) -> list[str]:
        """Returns the terms that differ, in words."""
        found = []
        for key in dict.fromkeys([*self.predicted, *self.compiled]):
            here, there = self.predicted.get(key, 0), self.compiled.get(key, 0)
            both = here > 0 and there > 0
            if (here > 0) == (there > 0) and not self.exact:
                continue
            if both and abs(here - there) <= TOLERANCE * here:
                continue
            # Where a compiler pads a scatter, it moves the ends of its pieces with permutes.
            if "permute" in key and there <= TOLERANCE * self._sent(key):
                continue
            if here != there:
                found.append(f"{key}: {here:,} bytes predicted, {there:,} compiled")
        if self.exact:
            taken = self.argument_bytes + self.temp_bytes + self.beside_bytes
            if taken > self.device_bytes:
                short = (taken - self.device_bytes) / 1e9
                found.append(f"memory: {taken / 1e9:,.2f} GB compiled, {short:,.2f} GB short")
            if abs(self.argument_bytes - self.planned_bytes) > TOLERANCE * self.planned_bytes:
                found.append(
                    f"weights and cache: {self.planned_bytes:,} bytes predicted, "
                    f"{self.argument_bytes:,} compiled"
                )
            found += [f"copy: none predicted, {copy} compiled" for copy in self.copies]
        return found

    def _sent(self, key: str) -> int:
        """Returns the bytes predicted for the part of the program that a term stands in."""
        part = key.rpartition(", ")[2]
        return sum(size for name, size in self.predicted.items() if name.endswith(f", {part}"))


@dataclass(frozen=True)
class Verified:
    """The steps of a plan beside what a compiler makes of them."""

    steps: tuple[Step, ...]

    def fields(self) -> dict[str, Any]:
        """Returns the comparison as JSON shows it."""
        every: dict[str, Any] = {}
        for step in self.steps:
            every[step.name] = msgspec.to_builtins(step) | {"differing": step.differing}
        return every

    def check(self) -> None:
        """Raises a JaxserveError naming the terms that differ, where any does."""
        found = [f"{step.name}: {text}" for step in self.steps for text in step.differing]
        if found:
            raise JaxserveError(
                f"the compiled program differs from the plan: {'; '.join(found)}; choose another "
                "of the best, or report it"
            )

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for step in self.steps:
            how = "from the cache" if step.cached else f"in {step.compile_s:.1f} s"
            what = "" if step.exact else "; kinds and axes alone, as a CPU stands in"
            table = Table(title=f"{step.name} for {step.on}, compiled {how}{what}")
            for name in ("", "predicted", "compiled", ""):
                table.add_column(name, justify="right" if name else "left")
            for key in dict.fromkeys([*step.predicted, *step.compiled]):
                here, there = step.predicted.get(key, 0), step.compiled.get(key, 0)
                table.add_row(key, f"{here:,}", f"{there:,}", _mark(here, there))
            if step.exact:
                rows = (
                    ("weights, cache, tokens", step.planned_bytes, step.argument_bytes),
                    ("temporaries (estimate)", step.estimated_temp_bytes, step.temp_bytes),
                    ("copies of weights or cache", 0, len(step.copies)),
                )
                for name, here, there in rows:
                    table.add_row(name, f"{here:,}", f"{there:,}", _mark(here, there))
            parts.append(table)
            parts += [Text(f"differs: {text}") for text in step.differing]
        return Group(*parts)


def _mark(here: int, there: int) -> str:
    """Returns a sign for what differs, and for what differs by no more than a compiler pads."""
    if here == there:
        return ""
    return "≈" if abs(here - there) <= TOLERANCE * here else "≠"


def verified(plan: Plan, limit_s: float = LIMIT_S) -> Verified:
    """Returns the best deployment's steps beside what its compiler makes of them.

    Args:
        limit_s: for each compile.

    Raises:
        UnsupportedError: the runtime cannot build the steps.
        JaxserveError: a compile failed, or took too long.
    """
    best = plan.best
    option = best.option
    lacking = [text for text in option.not_run() if option.serving is Serving.COLOCATED]
    if lacking:
        raise UnsupportedError(f"--verify cannot build a step with {'; '.join(lacking)}")
    found, steps = [], plan.steps
    demand = plan.found.demand
    for name, phase, on, sizes, batch, length in (
        (
            "prefill",
            option.prefill,
            option.prefill_part,
            option.prefill_sizes,
            best.group,
            best.chunk,
        ),
        ("decode", option.decode, option.part, option.sizes, best.batch, 1),
    ):
        slots = demand.input_tokens if name == "prefill" else demand.context_tokens
        # The program cuts rows evenly.
        slots = -(-slots // 128) * 128
        is_tpu = on.chip.name in COMPILED
        question = Question(
            plan.found.config,
            phase,
            (sizes["x"], sizes["y"], sizes["z"]),
            batch,
            slots,
            length,
            target=on.name if is_tpu else None,
            gpu=on.chip.device_kind if not is_tpu and known(on.chip.device_kind) else None,
            host_chips=on.chip.host_chips,
            megacore=on.chip.name == "v4",
            quantize=plan.quantize,
            kv_dtype=plan.kv_dtype,
            server=_server(plan, on) if is_tpu else None,
        )
        answer, cached = _asked(question, limit_s)
        found.append(_step(name, question, answer, cached, steps[name], on))
    return Verified(tuple(found))


def _server(plan: Plan, on: ChipSlice) -> Server | None:
    """Returns how a plan is served; None on one chip, or where phases have chips of their own."""
    layout = plan.layout
    if layout is None or layout.mesh.num_devices == 1:
        return None
    return Server(layout, int(on.device_hbm_bytes))


def _step(
    name: str,
    question: Question,
    answer: dict[str, Any],
    cached: bool,
    planned: Estimate,
    on: ChipSlice,
) -> Step:
    memory = planned.memory
    temporary = memory.gathered_bytes + memory.activation_bytes + memory.logits_bytes
    return Step(
        name,
        f"cpu:{on.num_devices}" if question.stand_in else on.name,
        not question.stand_in,
        answer["predicted"],
        answer["compiled"],
        tuple(answer["copies"]),
        answer["planned_bytes"],
        answer["argument_bytes"],
        int(temporary),
        answer["temp_bytes"],
        max(int(memory.kv_bytes) - answer["kv_bytes"], 0),
        int(on.device_hbm_bytes),
        answer["compile_s"],
        cached,
    )


def _asked(question: Question, limit_s: float) -> tuple[dict[str, Any], bool]:
    """Returns (what the child process found, whether it was found before)."""
    text = msgspec.json.encode(question)
    packages = ("jaxserve", "jax", "libtpu", "jax-cuda13-plugin")
    versions = [_version(name) for name in packages]
    what = text + json.dumps(versions).encode() + _sources()
    key = hashlib.sha256(what).hexdigest()[:32]
    kept = directory().parent / "verify" / f"{key}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8")), True
    found = _compiled(text, question, limit_s)
    _keep(kept, found)
    return json.loads(found), False


@cache
def _sources() -> bytes:
    """Returns a digest of what the answer is made by."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in ("planner", "partitioning", "layers", "pallas_kernels", "serving"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.digest()


def _compiled(text: bytes, question: Question, limit_s: float) -> str:
    """Returns the last line that a child process prints."""
    devices = question.mesh[0] * question.mesh[1] * question.mesh[2]
    settings = {"JAX_PLATFORMS": "cpu"}
    if question.stand_in:
        settings["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "jaxserve.planner.verify_child"]
    what = f"{question.target or question.gpu or 'CPU devices'}, {question.phase}"
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            timeout=limit_s,
            env=os.environ | settings,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise JaxserveError(
            f"compiling for {what} took more than {limit_s:g} s; plan a smaller step, as with "
            "--batch"
        ) from error
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode or not lines:
        raise JaxserveError(
            f"compiling for {what} failed with status {done.returncode}: "
            f"{_reason(done.stderr.decode(errors='replace'))}"
        )
    return lines[-1]


def _reason(text: str) -> str:
    """Returns the line that names an error, or the last."""
    lines = text.strip().splitlines() or ["it said nothing"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|error): ", line)]
    return (named or lines)[-1]


def _keep(path: Path, text: str) -> None:
    """Writes a result; a folder that cannot be written costs the next compile, not this one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        return


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
