"""Published measurements that the model of time is fitted to and tested against.

    [(row.name, row.measured_s, row.estimate().time_s) for row in ROWS]

Sources: Pope et al. 2022, tables 2 and 3 and section 4.4 (PaLM 540B on 64 TPU v4); Google's TPU
recipes (Llama 3.3 70B on eight TPU v6e, 1,024 tokens in and out, inter-token time).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

from jaxserve.models.named import named_config
from jaxserve.partitioning.dtypes import WEIGHTS
from jaxserve.partitioning.efficiency import Efficiency
from jaxserve.partitioning.estimate import Coster, Estimate
from jaxserve.partitioning.hardware import slice_of
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.memory import Kept

CUBE = (("x", 4), ("y", 4), ("z", 4))

PROMPT, DECODED = 2048, 64
"""Tokens of the paper's prompts, and those it decodes after them."""


@dataclass(frozen=True)
class Row:
    """A published time of one step.

    Attributes:
        name: for tables.
        phase: "prefill" or "decode".
        model, on, sizes: what ran where.
        layout: how.
        batch, new, context: sequences, tokens of each in the step, and cached before.
        weights: their dtype.
        measured_s: the published time.
        mfu: the published share of the peak.
    """

    name: str
    phase: str
    layout: PhaseLayout
    batch: int
    weights: str
    measured_s: float
    model: str = "palm-540b"
    on: str = "v4:4x4x4"
    sizes: tuple[tuple[str, int], ...] = field(default=CUBE)
    new: int = 1
    context: int = PROMPT + DECODED // 2
    mfu: float | None = None

    def estimate(self, efficiency: Efficiency | None = None) -> Estimate:
        """Returns what the model makes of it.

        Args:
            efficiency: constants; by default the fitted ones.
        """
        made = _coster(self)
        if efficiency is not None:
            made = replace(made, efficiency=efficiency)
        return made.estimate(self.batch, self.new, self.context)

    def error(self, efficiency: Efficiency | None = None) -> float:
        """Returns estimated by measured time, less one."""
        return float(self.estimate(efficiency).time_s / self.measured_s - 1)


@cache
def _coster(row: Row) -> Coster:
    config, on = named_config(row.model), slice_of(row.on)
    return Coster.of(config, row.layout, on, dict(row.sizes), Kept(WEIGHTS[row.weights]))


_HEADS, _BATCH = (PhaseLayout(Ffn.WS2D, heads) for heads in (Heads.HEADS, Heads.BATCH))
_GATHERED = PhaseLayout(Ffn.WG_XYZ, Heads.BATCH)
_V6E = {
    "model": "llama-3.1-70b",
    "on": "v6e:2x4",
    "sizes": (("x", 1), ("y", 2), ("z", 4)),
    "context": 1024 + 512,
}
_ONE = PhaseLayout(Ffn.WS1D, Heads.HEADS)

ROWS = (
    Row(
        "540B prefill, 1, int8", "prefill", _HEADS, 1, "int8", 0.29, new=PROMPT, context=0, mfu=0.43
    ),
    Row(
        "540B prefill, 512",
        "prefill",
        _GATHERED,
        512,
        "bfloat16",
        85.2,
        new=PROMPT,
        context=0,
        mfu=0.76,
    ),
    Row("540B decode, 64, int8", "decode", _BATCH, 64, "int8", 1.82 / DECODED, mfu=0.14),
    Row("540B decode, 64", "decode", _BATCH, 64, "bfloat16", 36.9e-3),
    Row("540B decode, 512", "decode", _BATCH, 512, "bfloat16", 6.0 / DECODED, mfu=0.33),
    Row("70B decode, 64, v6e-8", "decode", _ONE, 64, "bfloat16", 23.1e-3, **_V6E),
    Row("70B decode, 128, v6e-8", "decode", _ONE, 128, "bfloat16", 30.7e-3, **_V6E),
)
"""Rows that the constants are fitted to."""
