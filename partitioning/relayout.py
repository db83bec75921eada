"""Copies that a compiled program makes of weights or of the cache.

    for found in relayouts(compiled.as_text()):
        print(found)                        # layer: copy of argument 3, bf16[81920,1,129,128]

A step should read weights and cache where they lie. A copy counts if it moves an argument of the
program, or a part of one, and either turns it around or leaves it in the large memory; to bring
it as it lies into fast memory is how it is read, and a layer's part of a stack that goes to a
collective has to lie on its own. No JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.partitioning.cost import Where
from jaxserve.partitioning.hlo import Instruction, Program, Shape, is_start, parse

LEAST_BYTES = 2**20
"""Larger copies count: smaller ones cost less than a step's own overheads."""

_SAME = (
    *("bitcast", "reshape", "copy", "transpose", "slice", "dynamic-slice", "convert"),
    *("copy-start", "copy-done", "optimization-barrier", "all-gather"),
    # Written in place: what comes out lies where its first operand lay.
    *("dynamic-update-slice", "scatter"),
)
"""Operations whose result is their first operand, or a part of it, elsewhere."""

_IN_PLACE = ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Relayout:
    """A copy of an argument.

    Attributes:
        name: of the instruction.
        argument: number of the entry's parameter.
        shape: of the copy.
        where: part of the program.
    """

    name: str
    argument: int
    shape: Shape
    where: Where

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape.dims))
        return (
            f"{self.where}: {self.name} copies argument {self.argument} "
            f"({self.shape.bytes:,} bytes as {self.shape.dtype}[{dims}])"
        )


@dataclass(frozen=True)
class _Frame:
    """A computation and the line that calls it."""

    name: str
    where: Where
    caller: _Frame | None = None
    line: Instruction | None = None


def relayouts(text: str, least_bytes: int = LEAST_BYTES) -> list[Relayout]:
    """Returns the copies of arguments of more than `least_bytes`, in order."""
    program = parse(text)
    return list(_walk(program, _Frame(program.entry, Where.ENDS), least_bytes))


def _walk(program: Program, frame: _Frame, least: int) -> Iterator[Relayout]:
    for line in program.computations[frame.name].lines.values():
        if line.op == "while":
            (body,) = line.called["body"]
            yield from _walk(program, _Frame(body, frame.where.inner, frame, line), least)
        elif line.op in ("call", "conditional"):
            for names in line.called.values():
                for name in names:
                    yield from _walk(program, _Frame(name, frame.where, frame, line), least)
        elif line.shapes and line.shapes[0].bytes > least and _is_copy(program, frame, line):
            argument = _argument(program, frame, line.name)
            if argument is not None:
                yield Relayout(line.name, argument, line.shapes[0], frame.where)


def _is_copy(program: Program, frame: _Frame, line: Instruction) -> bool:
    """Returns whether a line moves data and does nothing else, but for bringing it nearer."""
    if line.op in ("copy", "transpose"):
        source = program.computations[frame.name].lines[line.operands[0]].shapes[0]
        own = line.shapes[0]
        return line.op == "transpose" or own.order != source.order or own.space == 0
    if line.op != "fusion":
        return False
    (called,) = line.called["calls"]
    inside = program.computations[called]
    turned, name = False, inside.root
    while (own := inside.lines[name]).op in _SAME:
        if own.op in _IN_PLACE:
            return False
        turned = turned or own.op in ("copy", "transpose")
        name = own.operands[0]
    left = line.shapes[0].space == 0 and not _is_sent(program, frame.name, line.name)
    return own.op == "parameter" and (turned or left)


def _is_sent(program: Program, computation: str, name: str) -> bool:
    """Returns whether collectives alone read a value."""

    def sends(line: Instruction) -> bool:
        if line.op == "bitcast":
            return _is_sent(program, computation, line.name)
        called = line.called.get("calls", ())
        starts = any(is_start(program.computations[one].lines) for one in called)
        return starts or line.op.startswith("all-")

    lines = program.computations[computation].lines.values()
    readers = [line for line in lines if name in line.operands]
    return bool(readers) and all(map(sends, readers))


def _argument(program: Program, frame: _Frame, name: str) -> int | None:
    """Returns the entry's parameter that a value is, or is a part of; None if it is computed."""
    line = program.computations[frame.name].lines[name]
    if line.op in _SAME:
        return _argument(program, frame, line.operands[0])
    if line.op == "parameter":
        if frame.caller is None or frame.line is None:
            return line.index
        if frame.line.op == "fusion":
            return _argument(program, frame.caller, frame.line.operands[line.index])
        return None
    if line.op == "get-tuple-element":
        return _element(program, frame, line.operands[0], line.index)
    if line.op == "fusion":
        (called,) = line.called["calls"]
        inner = _Frame(called, frame.where, frame, line)
        return _argument(program, inner, program.computations[called].root)
    return None


def _element(program: Program, frame: _Frame, name: str, index: int) -> int | None:
    """Returns what `_argument` does, for an element of a tuple."""
    line = program.computations[frame.name].lines[name]
    if line.op == "tuple":
        return _argument(program, frame, line.operands[index])
    if line.op in ("while", "optimization-barrier"):
        return _element(program, frame, line.operands[0], index)
    if line.op == "parameter" and frame.caller is not None and frame.line is not None:
        return _element(program, frame.caller, frame.line.operands[0], index)
    if line.op == "fusion":
        (called,) = line.called["calls"]
        inner = _Frame(called, frame.where, frame, line)
        return _element(program, inner, program.computations[called].root, index)
    return None
