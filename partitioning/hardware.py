"""Chips and slices of them, as numbers with their sources.

    on = slice_of("v4:4x4x4")                 # 64 chips in a torus
    on.chip.hbm                               # Value(1.2e12, Origin.SPEC, "Pope et al. 2022, ...")
    on.axes[0].ring                           # True: all sides are multiples of four

The numbers are those of `hardware.toml`; a file of the same form adds chips or replaces them. No
JAX.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError, UsageError
from jaxserve.partitioning.torus import Torus


class Origin(StrEnum):
    """Where a number comes from."""

    SPEC = "spec"
    MEASURED = "measured"
    FITTED = "fitted"
    ASSUMED = "assumed"


class Fabric(StrEnum):
    """How chips are joined."""

    PLANE = "plane"
    TORUS = "torus"
    SWITCH = "switch"
    NONE = "none"


@dataclass(frozen=True)
class Value:
    """A number and its source."""

    number: float
    origin: Origin
    source: str


Curve = tuple[tuple[float, float], ...]
"""(size, rate) of measurements, by size."""


@dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
        name: as slices name it.
        device_kind: as JAX names its devices.
        fabric: how chips are joined.
        host_chips, max_chips: chips of a host, and of a slice.
        tile: side of the matrix unit.
        devices: devices that JAX sees in a chip.
        values: by the names of `hardware.toml`.
        curves: measured rates by size: `hbm` by bytes read, `matmul` by rows of activations,
            `gather` (bytes that a device receives in a second, their way included) by bytes of
            the full tensor.
    """

    name: str
    device_kind: str
    fabric: Fabric
    host_chips: int
    max_chips: int
    tile: int
    devices: int = 1
    values: Mapping[str, Value] = field(default_factory=dict[str, Value])
    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])

    @property
    def hbm_bytes(self) -> Value:
        """Returns the memory of a chip."""
        return self.values["hbm_bytes"]

    @property
    def hbm(self) -> Value:
        """Returns the bytes per second from memory."""
        return self.values["hbm"]

    @property
    def flops(self) -> Value:
        """Returns bfloat16 operations per second."""
        return self.values["bfloat16"]

    @property
    def usd_hour(self) -> float | None:
        """Returns the price of a chip and hour; None where it is not known."""
        found = self.values.get("usd_hour")
        return None if found is None else found.number

    def number(self, name: str) -> float:
        """Returns a value, 0 where it is not known."""
        return self.values[name].number if name in self.values else 0.0


@dataclass(frozen=True)
class Axis:
    """One side of the grid that devices form.

    Attributes:
        size: devices along it.
        ring: it wraps around.
        bandwidth: bytes per second one way: of a link, or on a switch of all of a device's links.
        hop_s: from a device to the next; on a switch, to start a collective.
        switch: every device reaches every other directly.
    """

    size: int
    ring: bool
    bandwidth: float
    hop_s: float
    switch: bool = False


@dataclass(frozen=True)
class ChipSlice:
    """Chips that work together.

    Attributes:
        chip: their kind.
        shape: chips along each side.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Returns the slice as people write it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """Returns the chips of the slice."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """Returns the devices that JAX sees."""
        return self.num_chips * self.chip.devices

    @property
    def usd_hour(self) -> float | None:
        """Returns the price of the slice for an hour; None where it is not known."""
        return None if self.chip.usd_hour is None else self.chip.usd_hour * self.num_chips

    @property
    def device_hbm_bytes(self) -> float:
        """Returns the memory of one device."""
        return self.chip.hbm_bytes.number / self.chip.devices

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Returns the sides of the grid of devices, those of size 1 left out."""
        chip, hop_s = self.chip, self.chip.number("hop_s")
        if chip.fabric in (Fabric.SWITCH, Fabric.NONE):
            inside = chip.number("link") * max(chip.number("links"), 1)
            hosts, local = (1, *self.shape)[-2:]
            found = [
                Axis(hosts, False, chip.number("dcn"), hop_s, True),
                Axis(local, False, inside, hop_s, True),
            ]
        else:
            torus = Torus.of(chip.device_kind, self.shape)
            sides = zip(torus.shape, torus.wraps, strict=True)
            found = [Axis(size, ring, chip.number("link"), hop_s) for size, ring in sides]
            found.append(Axis(chip.devices, False, chip.number("inside"), hop_s))
        return tuple(axis for axis in found if axis.size > 1)

    @property
    def torus(self) -> Torus:
        """Returns the grid of devices as meshes are laid on it."""
        axes = self.axes
        return Torus(tuple(axis.size for axis in axes), tuple(axis.ring for axis in axes))

    def part(self, pieces: int) -> ChipSlice | None:
        """Returns one of equal pieces of the slice; None for none.

        It is cut across its longest sides, or between hosts first where chips of one share a
        switch.
        """
        shape = list(self.shape)
        left = pieces
        while left > 1:
            longest = max(range(len(shape)), key=lambda side: (shape[side], -side))
            if self.chip.fabric is Fabric.SWITCH and shape[0] > 1:
                longest = 0
            if left % 2 or shape[longest] % 2:
                return None
            shape[longest] //= 2
            left //= 2
        return ChipSlice(self.chip, tuple(shape))

    def __str__(self) -> str:
        return self.name


def chips(extra: Path | None = None) -> dict[str, Chip]:
    """Returns all chips by name.

    Args:
        extra: a file like `hardware.toml` whose chips come on top.

    Raises:
        ConfigError: a file is not of that form.
    """
    own = files("jaxserve").joinpath("partitioning", "hardware.toml")
    found = parse_chips(own.read_text(encoding="utf-8"), "hardware.toml")
    if extra is not None:
        try:
            text = extra.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{extra} cannot be read: {error}") from error
        found |= parse_chips(text, str(extra))
    return found


def slice_of(text: str, known: Mapping[str, Chip] | None = None) -> ChipSlice:
    """Returns the slice that "v4:4x4x4" or "h100:8" stands for.

    Raises:
        UsageError: the chip is not known, or forms no such slice.
    """
    known = chips() if known is None else known
    name, colon, sizes = text.partition(":")
    if name not in known:
        raise UsageError(
            f"chip {name!r} is not known; known: {', '.join(known)}. `jaxserve plan calibrate` "
            "and --hardware FILE add one"
        )
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
    except ValueError:
        shape = ()
    if not colon or not shape or min(shape) < 1:
        raise UsageError(f"slice {text!r} is not CHIP:SIZES, as in {_examples(known[name])[0]}")
    found = ChipSlice(known[name], shape)
    _check_shape(found)
    return found


def shapes(chip: Chip, most: int) -> list[ChipSlice]:
    """Returns the slices of a chip with up to `most` chips, by size."""
    powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
    match chip.fabric:
        case Fabric.PLANE:
            wide = [n for n in powers if 2 <= n <= 16]
            sides = [(1, 1), *((a, b) for a in wide for b in wide if a <= b <= 2 * a)]
        case Fabric.TORUS:
            every = [n for n in powers if n == 2 or n % 4 == 0]
            cubes = [(a, b, c) for a in every for b in every for c in every]
            sides = [(2, 2, 1), *(s for s in cubes if s[0] <= s[1] <= s[2] <= 2 * s[0])]
        case _:
            local = [(n,) for n in powers if n <= chip.host_chips]
            sides = [*local, *((n, chip.host_chips) for n in powers if n > 1)]
    found = [ChipSlice(chip, shape) for shape in sides if math.prod(shape) <= chip.max_chips]
    return sorted((one for one in found if one.num_chips <= most), key=lambda s: s.num_chips)


def parse_chips(text: str, origin: str) -> dict[str, Chip]:
    """Returns the chips of a TOML text.

    Raises:
        ConfigError: a table lacks a value, or has one that is not known.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not TOML: {error}") from error
    return {name: _chip(name, table, f"{origin}: [{name}]") for name, table in document.items()}


_FACTS = {"device_kind": str, "network": str, "host_chips": int, "max_chips": int, "tile": int}
_NEEDED = ("bfloat16", "hbm_bytes", "hbm", "hop_s")
_LINKS = ("link", "links", "inside", "dcn", "pcie")
_VALUES = (*_NEEDED, "int8", "fp8", "fp4", *_LINKS, "layer_s", "host_s", "usd_hour")
_CURVES = ("hbm", "matmul", "gather")
_MAY_BE_ZERO = ("hop_s", "layer_s", "usd_hour")
_COUNTS = ("host_chips", "max_chips", "tile")


def _chip(name: str, table: Any, where: str) -> Chip:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is no table; give the values of a chip")
    for key, kind in _FACTS.items():
        if not isinstance(table.get(key), kind):
            raise ConfigError(f"{where}: {key} is missing or no {kind.__name__}; set it")
    if table["network"] not in list(Fabric):
        raise ConfigError(
            f"{where}: network={table['network']!r} is not known; use one of {', '.join(Fabric)}"
        )
    allowed = {*_FACTS, *_VALUES, "devices", "curves"}
    if unknown := sorted(table.keys() - allowed):
        raise ConfigError(f"{where}: {unknown[0]} is not known; a chip has {', '.join(allowed)}")
    needed = [*_NEEDED, *(["link", "links"] if table["network"] != Fabric.NONE else [])]
    if missing := [key for key in needed if key not in table]:
        raise ConfigError(f"{where}: {missing[0]} is missing; give [number, origin, source]")
    values = {key: _value(table[key], f"{where}: {key}") for key in _VALUES if key in table}
    rates = {key: values[key].number for key in values.keys() - set(_MAY_BE_ZERO)}
    for key, number in (rates | {key: table[key] for key in _COUNTS}).items():
        if number <= 0:
            raise ConfigError(f"{where}: {key}={number} must be positive")
    curves = table.get("curves", {})
    if unknown := sorted(curves.keys() - set(_CURVES)):
        raise ConfigError(f"{where}: no curve is called {unknown[0]}; use {', '.join(_CURVES)}")
    return Chip(
        name,
        table["device_kind"],
        Fabric(table["network"]),
        table["host_chips"],
        table["max_chips"],
        table["tile"],
        table.get("devices", 1),
        values,
        {key: tuple((float(a), float(b)) for a, b in points) for key, points in curves.items()},
    )


def _value(found: Any, where: str) -> Value:
    match found:
        case [int() | float() as number, str() as origin, str() as source] if (
            origin in list(Origin) and source and number >= 0
        ):
            return Value(float(number), Origin(origin), source)
    raise ConfigError(
        f"{where}={found!r} is not [number, origin, source] with origin one of {', '.join(Origin)}"
    )


def _check_shape(found: ChipSlice) -> None:
    """Raises a UsageError where a chip does not come in this shape."""
    chip, shape = found.chip, found.shape
    match chip.fabric:
        case Fabric.PLANE:
            fits = shape == (1, 1) or (len(shape) == 2 and all(n in (2, 4, 8, 16) for n in shape))
            rule = "one chip, or two sides of 2, 4, 8 or 16"
        case Fabric.TORUS:
            fits = len(shape) == 3 and all(n in (1, 2) or n % 4 == 0 for n in shape)
            rule = "three sides, each 1, 2 or a multiple of 4"
        case _:
            fits = len(shape) in (1, 2) and shape[-1] <= chip.host_chips
            rule = f"up to {chip.host_chips} chips of one host, or HOSTSxCHIPS"
    if not fits or found.num_chips > chip.max_chips:
        raise UsageError(
            f"there is no slice {found.name}: {chip.name} comes as {rule}, up to "
            f"{chip.max_chips} chips, as in {', '.join(_examples(chip))}"
        )


def _examples(chip: Chip) -> Sequence[str]:
    match chip.fabric:
        case Fabric.PLANE:
            return [f"{chip.name}:4x4", f"{chip.name}:2x4"]
        case Fabric.TORUS:
            return [f"{chip.name}:4x4x4", f"{chip.name}:2x2x1"]
    return [f"{chip.name}:{chip.host_chips}", f"{chip.name}:1"]
