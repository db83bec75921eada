"""When the learning rate rises, holds and falls, and when sequences become long.

Warm-up, then a constant rate, then a linear fall to zero over the last steps (Hu et al. 2024,
MiniCPM, section 4). While the rate is constant the end may still move: a run can be prolonged, or
ended early, by resuming its checkpoint with other `--steps`.
"""

from __future__ import annotations

from dataclasses import dataclass

import optax

from jaxserve.errors import UsageError


@dataclass(frozen=True, slots=True)
class Plan:
    """Lengths of the phases of a run, in optimizer steps, and its batches.

    Attributes:
        steps: all steps.
        warmup_steps: the rate rises linearly from zero.
        decay_steps: the rate falls linearly to zero at the end.
        long_steps: the last steps, which run on sequences of `long_tokens`.
        batch_tokens: tokens of a step, in every phase.
        short_tokens, long_tokens: sequence lengths of the phases.
    """

    steps: int
    warmup_steps: int
    decay_steps: int
    long_steps: int
    batch_tokens: int
    short_tokens: int
    long_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.decay_steps <= self.steps or not 0 <= self.long_steps <= self.steps:
            raise UsageError(
                f"decay_steps={self.decay_steps} and long_steps={self.long_steps} must lie "
                f"within steps={self.steps}"
            )
        for length in (self.short_tokens, self.long_tokens):
            if self.batch_tokens % length:
                raise UsageError(
                    f"batch_tokens={self.batch_tokens} is not a multiple of {length} tokens"
                )

    def length_at(self, step: int) -> int:
        """Returns the sequence length of a step, tokens."""
        return self.long_tokens if step >= self.steps - self.long_steps else self.short_tokens

    def rate(self, peak: float) -> optax.Schedule:
        """Returns the learning rate by step."""
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, self.warmup_steps),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, self.decay_steps),
            ],
            [self.warmup_steps, self.steps - self.decay_steps],
        )
