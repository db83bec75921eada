"""Collectives of a compiled program, read from its text.

    text = compiled.as_text()
    for found in collectives(text, {"x": 4, "y": 4, "z": 4}):
        print(found)                     # all-gather over z, y of 589,824 bytes of bf16 in a layer

XLA prints one program per device. Layers that repeat are the body of a loop, which is printed once;
what stands outside of it are the ends of the model. No JAX.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxserve.errors import UnsupportedError
from jaxserve.partitioning.cost import Collective, Where
from jaxserve.partitioning.placement import Kind

_KINDS = tuple(kind.value for kind in Kind if kind is not Kind.CUT)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|called_computations|true_computation|false_computation|"
    r"branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_BRANCHES = ("true_computation", "false_computation", "branch_computations")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_BITS = {"pred": 8, "token": 0, "bf16": 16}


@dataclass(frozen=True)
class Shape:
    """An array of a program.

    Attributes:
        order: dimensions from the fastest to the slowest, as "1,0".
        space: number of the memory it lies in; 0 is the large one.
    """

    dtype: str
    dims: tuple[int, ...]
    order: str
    space: int

    @property
    def bytes(self) -> int:
        """Returns its bytes without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(found[1]) if found else 0
        return math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        op: such as "all-gather".
        shapes: its result, a tuple's arrays in order.
        operands: names.
        rest: attributes, as they are printed.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Returns computations by the attribute that names them."""
        return {kind: tuple(_OPERAND.findall(names)) for kind, names in _CALLED.findall(self.rest)}

    @property
    def index(self) -> int:
        """Returns the number of a parameter or of a tuple's element."""
        if self.op == "parameter":
            return int(self.rest.split(")")[0])
        found = re.search(r"index=(\d+)", self.rest)
        assert found
        return int(found[1])


@dataclass(frozen=True)
class Computation:
    """A function of a program.

    Attributes:
        lines: instructions by name, in order.
        root: name of the result.
    """

    name: str
    lines: Mapping[str, Instruction]
    root: str

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Returns names of parameters by number."""
        return {line.index: line.name for line in self.lines.values() if line.op == "parameter"}


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that is called from outside.
    """

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Returns the program of an optimised HLO text."""
    found: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    lines: dict[str, Instruction] = {}
    for raw in text.splitlines():
        if raw[:1] in ("%", "E") and raw.rstrip().endswith("{"):
            named = _OPERAND.search(raw)
            assert named
            name, lines, root = named[1], {}, ""
            entry = name if raw.startswith("ENTRY") else entry
        elif raw.startswith("}"):
            found[name] = Computation(name, lines, root)
        elif (line := _instruction(raw)) is not None:
            lines[line.name] = line
            root = line.name if raw.lstrip().startswith("ROOT") else root
    return Program(found, entry)


def _instruction(raw: str) -> Instruction | None:
    name, equals, rest = raw.strip().removeprefix("ROOT ").partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = _type_end(rest)
    op, _, arguments = rest[end + 1 :].partition("(")
    inside, _, attributes = arguments.partition(")")
    kept = f"{inside}){attributes}" if op == "parameter" else attributes
    return Instruction(
        name[1:], op, tuple(shapes(rest[:end])), tuple(_OPERAND.findall(inside)), kept
    )


def _type_end(text: str) -> int:
    """Returns where the type ends that a line begins with: at a space outside of all brackets."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == " " and not depth:
            return place
    return len(text)


def shapes(text: str) -> Iterator[Shape]:
    """Yields the arrays of a printed type."""
    for dtype, dims, layout in _ARRAY.findall(text):
        order, _, tiles = layout.partition(":")
        space = re.search(r"S\((\d+)\)", tiles)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, order, int(space[1]) if space else 0)


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """Returns what a compiled program sends, in the order in which it stands there.

    Args:
        sizes: devices along each axis of the mesh, the slowest first.

    Raises:
        UnsupportedError: groups of devices that are not axes of the mesh.
    """
    program = parse(text)
    return list(_walk(program, program.entry, Where.ENDS, sizes, _started(program)))


def _walk(
    program: Program,
    name: str,
    where: Where,
    sizes: Mapping[str, int],
    started: frozenset[str],
    fused: bool = False,
) -> Iterator[Collective]:
    lines = program.computations[name].lines
    for line in lines.values():
        if (kind := _kind(line)) is not None:
            if not (fused and _channel(line) in started and not is_start(lines)):
                yield from _read(line, kind, where, sizes)
            continue
        if line.op == "fusion" and (one := _scatter_inside(program, line)) is not None:
            yield from _read(one, Kind.REDUCE_SCATTER, where, sizes, whole=True)
            continue
        if line.op.endswith(("-update", "-done")):
            continue
        for attribute, names in line.called.items():
            inner = where
            if attribute == "body":
                inner = where.inner
            elif attribute in _BRANCHES:
                inner = where.branch
            for called in names:
                within = fused or line.op == "fusion"
                yield from _walk(program, called, inner, sizes, started, within)


def _started(program: Program) -> frozenset[str]:
    """Returns channels of collectives that go on beside other work.

    Such a one is printed within the fusion that starts it, again within each one beside which it
    goes on, and in the one that ends it.
    """
    return frozenset(
        _channel(line)
        for computation in program.computations.values()
        if is_start(computation.lines)
        for line in computation.lines.values()
        if _kind(line) is not None
    )


def is_start(lines: Mapping[str, Instruction]) -> bool:
    """Returns whether a computation starts a collective that goes on beside other work."""
    return any("AsyncCollectiveStart" in one.rest for one in lines.values())


def _channel(line: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", line.rest)
    return found[1] if found else ""


def _kind(line: Instruction) -> str | None:
    kind = line.op.removesuffix("-start")
    return kind if kind in _KINDS else None


def _scatter_inside(program: Program, line: Instruction) -> Instruction | None:
    """Returns the all-reduce of a fusion that keeps one piece of its result."""
    for called in line.called.get("calls", ()):
        if called.startswith("all-reduce-scatter") or line.name.startswith("all-reduce-scatter"):
            inside = program.computations[called].lines.values()
            return next((one for one in inside if one.op == "all-reduce"), None)
    return None


def _read(
    line: Instruction, kind: str, where: Where, sizes: Mapping[str, int], whole: bool = False
) -> Iterator[Collective]:
    """Yields the collectives of a line, one for each dtype.

    Args:
        whole: the line's result is the operand, not one piece of it.
    """
    axes = _axes(line.rest, sizes)
    if not axes:
        return
    found = list(line.shapes)
    if line.op.endswith("-start") and kind != Kind.ALL_REDUCE:
        # Operands, results, then what the device notes.
        arrays = [shape for shape in found if shape.dims or shape.dtype not in ("u32", "s32")]
        found = arrays[len(arrays) // 2 :]
    pieces = 1
    if kind == Kind.REDUCE_SCATTER and not whole:
        pieces = math.prod(sizes[axis] for axis in axes)
    for dtype in dict.fromkeys(shape.dtype for shape in found):
        full = sum(shape.bytes for shape in found if shape.dtype == dtype) * pieces
        yield Collective(kind, axes, dtype, full, where)


def _axes(text: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of more than one device over which groups of devices lie."""
    if mesh := _MESH.search(text):
        names = re.findall(r"'(\w+)'", mesh[2])
        if re.sub(r"'\w+'|[\s,]", "", mesh[2]):
            raise UnsupportedError(f"groups {mesh[0]} split an axis of the mesh; use other axes")
        declared = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return tuple(axis for axis in sizes if axis in names and declared[axis] > 1)
    if pairs := _PAIRS.search(text):
        return _spanned([_numbers(pair) for pair in pairs[1][1:-1].split("},{")], sizes)
    if iota := _IOTA.search(text):
        groups = _iota(*(_numbers(part or "") for part in iota.groups()))
    elif lists := _LISTS.search(text):
        groups = [_numbers(group) for group in lists[1][1:-1].split("},{")]
    else:
        raise UnsupportedError(f"a collective without groups of devices: {text[:200]}")
    axes = _spanned(groups, sizes)
    count = math.prod(sizes[axis] for axis in axes)
    if any(len(set(group)) != count or _spanned([group], sizes) != axes for group in groups):
        raise UnsupportedError(f"groups of devices {groups[:2]} ... are no axes of the mesh")
    return axes


def _spanned(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes along which members of a group differ."""
    found: set[str] = set()
    for group in groups:
        for axis, places in _places(group, sizes).items():
            if len(set(places)) > 1:
                found.add(axis)
    return tuple(axis for axis in sizes if axis in found)


def _places(group: Sequence[int], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    stride = math.prod(sizes.values())
    for axis, size in sizes.items():
        stride //= size
        places[axis] = [number // stride % size for number in group]
    return places


def _iota(shape: list[int], dims: list[int], order: list[int]) -> list[list[int]]:
    """Returns groups written as [groups, size]<=[dims]T(order)."""
    order = order or list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    spans = [[place * strides[dim] for place in range(dims[dim])] for dim in order]
    numbers = [sum(parts) for parts in itertools.product(*spans)]
    size = shape[-1]
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]
