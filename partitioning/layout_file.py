"""How a model is served from a mesh, as one value and as one file.

    layout = choose(config, "bfloat16", mesh="2,2,2", layout="ws2d", attention="batch")
    layout.write("layout.json")
    choose(config, "bfloat16", layout="layout.json") == layout

A layout that fits neither the model nor itself is refused where it is made or read. No JAX.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError, UnsupportedError, UsageError
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.padding import Padding
from jaxserve.partitioning.plan import MeshPlan

VERSION = 1
"""Of the schema; a file of another one is refused."""

Name = TypeVar("Name", bound=StrEnum)


class Dtypes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Element types that are computed with; that weights or cache are rounded is said beside."""

    weights: str
    activations: str
    kv: str


class Buckets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Largest step that programs are compiled for; see `EngineOptions`."""

    max_sequences: int = 32
    max_step_tokens: int = 512


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lies where, in both phases of serving.

    Attributes:
        model: digest of the sizes that a layout depends on; see `model_digest`.
        mesh: devices along each axis.
        prefill, decode: of steps with more than one token a sequence, and of others. Both store
            weights and cache alike.
        dtypes: of a run.
        buckets: sizes of an engine; None leaves them open.
        version: of the schema.
    """

    model: str
    mesh: MeshPlan
    prefill: PhaseLayout
    decode: PhaseLayout
    dtypes: Dtypes
    buckets: Buckets | None = None
    version: int = VERSION

    @property
    def padding(self) -> Padding:
        """Returns what makes a model divide over the mesh."""
        return Padding(tuple(dict.fromkeys((self.prefill, self.decode))), self.mesh.sizes)

    def check(self, config: ModelConfig, dtype: str | None = None) -> None:
        """Checks that the layout can serve a model.

        Args:
            dtype: in which the model is to run; None takes the layout's.

        Raises:
            UsageError: it is another model's, its width does not divide over the mesh, or the
                phases do not go together.
            UnsupportedError: it asks for different dtypes.
        """
        if self.model != (found := model_digest(config)):
            raise UsageError(
                f"the layout was made for a model with digest {self.model}, and this one has "
                f"{found}; make a layout for it, by naming the mesh and the layout"
            )
        _check_pair(self.prefill, self.decode)
        self.padding.check(config)
        types = {self.dtypes.weights, self.dtypes.activations, self.dtypes.kv}
        if len(types) > 1:
            raise UnsupportedError(
                f"weights in {self.dtypes.weights}, activations in {self.dtypes.activations} and "
                f"keys and values in {self.dtypes.kv}: give all the same dtype"
            )
        if dtype is not None and types != {dtype}:
            raise UsageError(
                f"the layout is for {self.dtypes.weights}, and the model is to run in {dtype}; "
                f"use dtype={self.dtypes.weights!r}, or make a layout for {dtype}"
            )

    def write(self, path: str | Path) -> None:
        """Writes the layout as JSON."""
        Path(path).write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Returns the layout as JSON."""
        return json.dumps(msgspec.to_builtins(self), indent=2) + "\n"

    def __str__(self) -> str:
        phases = str(self.decode)
        if self.prefill != self.decode:
            phases = f"prefill {self.prefill}, decode {self.decode}"
        return f"{phases} on {self.mesh}"


def read_layout(path: str | Path) -> Layout:
    """Returns the layout in a file.

    Raises:
        CheckpointError: it cannot be read, or is none.
        UnsupportedError: its schema has another version.
    """
    try:
        data = Path(path).read_bytes()
        raw = msgspec.json.decode(data)
        found = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(found, int) and found != VERSION:
            raise UnsupportedError(
                f"{path} has schema version {found}, and this build reads {VERSION}; make the "
                "layout again"
            )
        layout = msgspec.json.decode(data, type=Layout)
        for name, kind in (("mesh", MeshPlan), ("prefill", PhaseLayout), ("decode", PhaseLayout)):
            known = [one.name for one in fields(kind)]
            if unknown := sorted(raw[name].keys() - set(known)):
                raise CheckpointError(
                    f"{path} is no layout: {name} has {unknown[0]!r}, and not one of "
                    f"{', '.join(known)}"
                )
        return layout
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no layout: {error}") from error


def choose(
    config: ModelConfig,
    dtype: str,
    *,
    mesh: MeshPlan | str | Sequence[int] | None = None,
    layout: Layout | str | Path | None = None,
    prefill_layout: str | None = None,
    attention: str | None = None,
) -> Layout | None:
    """Returns the layout that a person asks for, checked; None where no mesh is.

    Args:
        dtype: in which the model runs.
        mesh: sizes of x, y and z.
        layout: "ws1d", "ws2d", "wg-x", "wg-xy" or "wg-xyz", of both phases; or a layout, or the
            file of one, which then says everything.
        prefill_layout: of prefill, if it has another.
        attention: "heads", "batch", "heads-batch", "heads-batch-xy" or "sequence".

    Raises:
        UsageError: a name is unknown, or the layout does not fit the model.
    """
    if isinstance(layout, Path) or (isinstance(layout, str) and layout.endswith(".json")):
        layout = read_layout(layout)
    others = {"mesh": mesh, "prefill_layout": prefill_layout, "attention": attention}
    given = [name for name, value in others.items() if value is not None]
    if isinstance(layout, Layout):
        if given:
            raise UsageError(f"the layout says what {given[0]} is; leave {given[0]} out")
        layout.check(config, dtype)
        return layout
    if mesh is None:
        if layout is not None or given:
            name = "layout" if layout is not None else given[0]
            raise UsageError(f"{name} needs a mesh; give its sizes X,Y,Z, as in 2,2,2")
        return None
    ffn = _named(Ffn, "layout", layout or Ffn.WS2D)
    first = _named(Ffn, "prefill_layout", prefill_layout or ffn)
    heads = _named(Heads, "attention", attention or Heads.HEADS)
    found = Layout(
        model=model_digest(config),
        mesh=MeshPlan.of(mesh),
        prefill=PhaseLayout(first, heads),
        decode=PhaseLayout(ffn, heads),
        dtypes=Dtypes(dtype, dtype, dtype),
    )
    found.check(config, dtype)
    return found


def model_digest(config: ModelConfig) -> str:
    """Returns a digest of what a layout depends on: family, vocabulary, width, heads and MLPs."""
    sizes = [config.family, config.vocab_size, config.embed_dim, config.tied]
    layers = [
        [
            layer.attention.num_heads,
            layer.attention.num_kv_heads,
            layer.attention.head_dim,
            layer.mlp.ffn_dim,
            layer.mlp.gated,
            layer.block.value,
        ]
        for layer in config.layers
    ]
    text = json.dumps([sizes, layers], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_pair(prefill: PhaseLayout, decode: PhaseLayout) -> None:
    """Checks that two phases can serve from the same weights and the same cache.

    Raises:
        UsageError: they cannot.
    """
    if (prefill.ffn is Ffn.WS1D) != (decode.ffn is Ffn.WS1D):
        others = ", ".join(ffn for ffn in Ffn if ffn is not Ffn.WS1D)
        raise UsageError(
            f"prefill in {prefill.ffn} and decode in {decode.ffn} store weights differently; use "
            f"ws1d for both, or any two of {others}"
        )
    if prefill.heads is not decode.heads:
        raise UsageError(
            f"prefill with attention by {prefill.heads} and decode by {decode.heads} store keys "
            "and values differently; use the same for both"
        )


def _named(kind: type[Name], option: str, value: str) -> Name:
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{option}={value!r} is not known; use one of {', '.join(kind)}") from None
