"""Plans on their way from rank 0: numbered, chained, and only what the receiver cannot know.

    writer, reader = PlanWriter(key), PlanReader(key)
    message = writer.plan(plan)                         # Plan(chain, body), a few dozen bytes
    plan = reader.read(message)                         # a StepPlan, or None: forget everything

A steady decode step names no rows: they are those of the step before, each one token further on.
Of a request travels what a runner reads: sampling parameters that are not the default, and tokens
only where the sampler looks at them. The chain is a keyed hash over all bodies so far, so a plan
that is lost, doubled, changed or of another group is refused.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import msgspec

from jaxserve.serving.multihost.messages import GroupLostError, Plan
from jaxserve.serving.plan import Admission, RowKind, StepPlan
from jaxserve.serving.request import Request, SamplingParams

CHAIN_BYTES = 16

_DEFAULTS = SamplingParams()
_FIELDS = SamplingParams.__struct_fields__
_TEXT = ("stop", "bad_words")
"""What others than runners read."""


class Admitted(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a runner reads of an `Admission`.

    Attributes:
        params: by index of the field, those that are not the default.
        prompt_tokens: length of the prompt.
        prompt: the prompt, where its log-probabilities are wanted.
        tokens: prompt and output so far, where the sampler looks at them.
    """

    slot: int
    sample_index: int
    prompt_tokens: int
    params: dict[int, Any]
    stop_ids: tuple[int, ...] = ()
    beam_width: int = 1
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


class Step(msgspec.Struct, array_like=True, omit_defaults=True, tag="s"):
    """A `StepPlan` as the difference to the one before.

    Attributes:
        starts: by row, where a row does not go on where its slot ended.
        slots: None: those of the plan before.
        decodes: rows at the front that go on by one token; None: all.
        counts, kinds: of the rows after them.
    """

    number: int
    starts: dict[int, int] = {}
    writes: list[list[int]] = []
    slots: list[int] | None = None
    decodes: int | None = None
    counts: list[int] = []
    kinds: list[int] = []
    tokens: list[int] = []
    admissions: list[Admitted] = []
    copies: list[list[int]] = []


class Reset(msgspec.Struct, array_like=True, tag="r"):
    """Forget pages and slots."""

    number: int


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Step | Reset] = msgspec.msgpack.Decoder(Step | Reset)


class _Chain:
    """The keyed hash over everything so far."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._last = b""

    def add(self, body: bytes) -> bytes:
        """Returns the hash with one more body."""
        self._last = hashlib.blake2b(
            self._last + body, key=self._key, digest_size=CHAIN_BYTES
        ).digest()
        return self._last


class _Rows:
    """What both sides know of the rows of the last plan."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.ends: dict[int, int] = {}

    def predicted(self, slots: Sequence[int]) -> list[int]:
        """Returns where each slot's row would begin."""
        ends = self.ends
        return [ends.get(slot, 0) for slot in slots]

    def note(self, slots: list[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Takes a plan for the next one's past."""
        self.slots = slots
        self.ends.update(
            (slot, start + count) for slot, start, count in zip(slots, starts, counts, strict=True)
        )


class PlanWriter:
    """Writes plans; its single writer is the engine's thread."""

    def __init__(self, key: bytes) -> None:
        self._chain = _Chain(key)
        self._rows = _Rows()

    def plan(self, plan: StepPlan) -> Plan:
        """Returns the message of a plan."""
        rows = self._rows
        slots, counts, kinds = list(plan.slots), plan.counts, plan.kinds
        predicted = rows.predicted(slots)
        decodes = _leading_decodes(counts, kinds)
        step = Step(
            plan.number,
            {}
            if predicted == plan.starts
            else {
                row: start
                for row, (start, guess) in enumerate(zip(plan.starts, predicted, strict=True))
                if start != guess
            },
            _flat(plan.writes),
            None if slots == rows.slots else slots,
            None if decodes == len(slots) else decodes,
            counts[decodes:],
            kinds[decodes:],
            plan.tokens,
            [_stripped(admission) for admission in plan.admissions],
            _flat(plan.copies),
        )
        rows.note(slots, plan.starts, counts)
        return self._sealed(step)

    def reset(self, number: int) -> Plan:
        """Returns the message that has all ranks forget pages and slots."""
        self._rows = _Rows()
        return self._sealed(Reset(number))

    def _sealed(self, body: Step | Reset) -> Plan:
        encoded = _ENCODER.encode(body)
        return Plan(self._chain.add(encoded), encoded)


class PlanReader:
    """Reads plans in their order."""

    def __init__(self, key: bytes) -> None:
        self._chain = _Chain(key)
        self._rows = _Rows()
        self._number = 0

    def read(self, message: Plan) -> StepPlan | None:
        """Returns a plan; None has the runner forget pages and slots.

        Raises:
            GroupLostError: it is not the one that follows.
        """
        if not hmac.compare_digest(self._chain.add(message.body), message.chain):
            raise GroupLostError(
                f"what came after plan {self._number} was not sent by rank 0 of this group, or "
                "something before it was lost"
            )
        step = _DECODER.decode(message.body)
        if isinstance(step, Reset):
            self._rows = _Rows()
            self._number = 0
            return None
        if self._number and step.number != self._number + 1:
            raise GroupLostError(f"plan {step.number} came after plan {self._number}")
        self._number = step.number
        return self._whole(step)

    def _whole(self, step: Step) -> StepPlan:
        rows = self._rows
        slots = rows.slots if step.slots is None else step.slots
        decodes = len(slots) if step.decodes is None else step.decodes
        counts = [1] * decodes + step.counts
        kinds = [int(RowKind.DECODE)] * decodes + step.kinds
        starts = rows.predicted(slots)
        for row, start in step.starts.items():
            starts[row] = start
        rows.note(slots, starts, counts)
        return StepPlan(
            number=step.number,
            slots=list(slots),
            counts=counts,
            starts=starts,
            kinds=kinds,
            tokens=step.tokens,
            admissions=[_admission(admitted) for admitted in step.admissions],
            writes=_triples(step.writes),
            copies=_triples(step.copies),
        )


def reads_tokens(request: Request) -> bool:
    """Returns whether the sampler looks at the tokens of a request."""
    p = request.params
    return bool(
        p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.allowed_token_ids
        or request.bad_word_ids
        or p.min_tokens
    )


def _leading_decodes(counts: Sequence[int], kinds: Sequence[int]) -> int:
    """Returns how many rows at the front go on by one token."""
    size = len(kinds)
    if kinds == [RowKind.DECODE] * size and counts == [1] * size:
        return size
    for row, (count, kind) in enumerate(zip(counts, kinds, strict=True)):
        if count != 1 or kind != RowKind.DECODE:
            return row
    return size


def _flat(groups: Sequence[Sequence[tuple[int, int, int]]]) -> list[list[int]]:
    return [[number for triple in group for number in triple] for group in groups]


def _triples(groups: Sequence[Sequence[int]]) -> list[list[tuple[int, int, int]]]:
    return [list(zip(*[iter(group)] * 3, strict=True)) for group in groups]


def _stripped(admission: Admission) -> Admitted:
    request = admission.request
    params = request.params
    given = {
        index: value
        for index, name in enumerate(_FIELDS)
        if (value := getattr(params, name)) != getattr(_DEFAULTS, name) and name not in _TEXT
    }
    return Admitted(
        admission.slot,
        admission.sample_index,
        len(request.prompt),
        given,
        request.stop_ids,
        request.beam_width,
        request.bad_word_ids,
        request.prompt if params.prompt_logprobs is not None else (),
        admission.tokens if reads_tokens(request) else (),
    )


def _admission(admitted: Admitted) -> Admission:
    params = SamplingParams(**{_FIELDS[index]: v for index, v in admitted.params.items()})
    request = Request(
        id="-",  # a runner reads no names
        prompt=admitted.prompt or (0,) * admitted.prompt_tokens,
        params=params,
        stop_ids=admitted.stop_ids,
        bad_word_ids=admitted.bad_word_ids,
        beam_width=admitted.beam_width,
    )
    return Admission(admitted.slot, request, admitted.sample_index, admitted.tokens)
