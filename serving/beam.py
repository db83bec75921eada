"""Beam search: which continuations live on, which are finished, and when it is over.

    rules = BeamRules(width=4, max_tokens=64, stop_ids=frozenset({0}))
    search = BeamSearch(rules)
    while not search.done:
        choices = search.step([candidates(beam.tokens) for beam in search.beams])
    best = search.finished[0]

The rules are those of Hugging Face's beam search with `early_stopping=False`: of the continuations
of all beams, ordered by the sum of their log-probabilities, the first `width` that end become
hypotheses, and the first `width` that do not end live on. A hypothesis' score is its sum divided
by its length to the power of the length penalty; the best `width` hypotheses are kept. The search
is over when they are `width` and the best living beam, scored at its present length, is no better
than the worst of them, or when no beam is left. Pure: no JAX, no NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from jaxserve.errors import UsageError
from jaxserve.serving.request import MAX_LOGPROBS, Request

Candidate = tuple[int, float]
"""A token and its log-probability after a beam."""


class BeamRules(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a search.

    Attributes:
        width: beams that live on after each step, and hypotheses that are kept.
        max_tokens: longest hypothesis.
        min_tokens: no stop token before this many tokens.
        stop_ids: tokens that end a hypothesis.
        length_penalty: power of the length that a sum of log-probabilities is divided by; above 0
            favours long hypotheses, below 0 short ones.
    """

    width: int
    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    length_penalty: float = 1.0

    @property
    def num_candidates(self) -> int:
        """Returns how many of each beam's likeliest tokens a step must see.

        `width` continuations that do not end must be left when every stop token is among them.
        """
        return self.width + max(self.width, len(self.stop_ids))


def beam_rules(request: Request, room: int | None = None) -> BeamRules:
    """Returns the rules of a request's search.

    Args:
        request: with a beam width.
        room: tokens that the context leaves for output.

    Raises:
        UsageError: it needs more candidates of a step than there are, or asks for what a search
            among the likeliest continuations has no use for.
    """
    params = request.params
    for name in _UNUSED:
        if value := getattr(params, name):
            neutral = type(value)()
            raise UsageError(f"{name}={value!r} has no effect on beams; leave it at {neutral!r}")
    if params.repetition_penalty not in (None, 1.0):
        raise UsageError(
            f"repetition_penalty={params.repetition_penalty} has no effect on beams; leave it at 1"
        )
    most = params.max_tokens or 1
    rules = BeamRules(
        width=request.beam_width,
        max_tokens=most if room is None else min(most, room),
        min_tokens=params.min_tokens or 0,
        stop_ids=frozenset(request.stop_ids).union(params.stop_token_ids),
        length_penalty=request.length_penalty,
    )
    if rules.num_candidates > MAX_LOGPROBS:
        raise UsageError(
            f"beam_width={rules.width} with {len(rules.stop_ids)} stop tokens needs "
            f"{rules.num_candidates} candidates of each beam, and there are {MAX_LOGPROBS}; use a "
            f"beam_width of at most {MAX_LOGPROBS // 2} and fewer stop tokens"
        )
    return rules


_UNUSED = (
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop",
)


class Beam(NamedTuple):
    """A living continuation: its tokens, and the log-probability of each."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0


class Hypothesis(NamedTuple):
    """A finished continuation; `stopped` where a stop token ended it, which is the last token."""

    beam: Beam
    score: float
    stopped: bool


class Choice(NamedTuple):
    """What one step decides.

    Attributes:
        beams: (index of the parent, continuation) of the living, best first.
        finished: every hypothesis kept so far, best first.
        done: whether the search is over.
    """

    beams: list[tuple[int, Beam]]
    finished: list[Hypothesis]
    done: bool


def choose(
    rules: BeamRules,
    beams: Sequence[Beam],
    candidates: Sequence[Sequence[Candidate]],
    finished: Sequence[Hypothesis],
) -> Choice:
    """Returns the beams and hypotheses after one more token.

    Args:
        rules: what decides.
        beams: the living, all of one length.
        candidates: each beam's likeliest tokens, `rules.num_candidates` of them or the whole
            vocabulary.
        finished: hypotheses kept so far, best first.
    """
    length = len(beams[0].tokens) + 1
    ordered = _ordered(rules, beams, candidates, length)
    last = length >= rules.max_tokens
    weight = float(length) ** rules.length_penalty

    living = [
        (parent, _longer(beams[parent], token, logprob))
        for _, parent, token, logprob in ordered
        if not last and token not in rules.stop_ids
    ][: rules.width]
    # Only a continuation among the first `width` may end; the others merely stand by.
    ended = [
        Hypothesis(_longer(beams[parent], token, logprob), total / weight, token in rules.stop_ids)
        for total, parent, token, logprob in ordered[: rules.width]
        if last or token in rules.stop_ids
    ]
    kept = sorted([*finished, *ended], key=lambda h: -h.score)[: rules.width]
    full = len(kept) == rules.width
    done = not living or (full and living[0][1].total / weight <= kept[-1].score)
    return Choice([] if done else living, kept, done)


def _ordered(
    rules: BeamRules,
    beams: Sequence[Beam],
    candidates: Sequence[Sequence[Candidate]],
    length: int,
) -> list[tuple[float, int, int, float]]:
    """Returns (sum, parent, token, log-probability) of all continuations, best first.

    Ties go to the lower parent and then to the lower token.
    """
    may_stop = length > rules.min_tokens
    whole = [
        (beam.total + logprob, parent, token, logprob)
        for parent, (beam, tokens) in enumerate(zip(beams, candidates, strict=True))
        for token, logprob in tokens
        if may_stop or token not in rules.stop_ids
    ]
    return sorted(whole, key=lambda c: (-c[0], c[1], c[2]))


def _longer(beam: Beam, token: int, logprob: float) -> Beam:
    return Beam((*beam.tokens, token), (*beam.logprobs, logprob), beam.total + logprob)


class BeamSearch:
    """A search under way; itself the only writer of its beams and hypotheses."""

    def __init__(self, rules: BeamRules) -> None:
        self.rules = rules
        self.beams: list[Beam] = [Beam()]
        self.finished: list[Hypothesis] = []
        self.done = False

    def step(self, candidates: Sequence[Sequence[Candidate]]) -> list[tuple[int, int]]:
        """Returns (index of the parent, token) of each beam that lives on; none when it is over.

        Args:
            candidates: the likeliest tokens after each of `beams`.
        """
        choice = choose(self.rules, self.beams, candidates, self.finished)
        self.beams = [beam for _, beam in choice.beams]
        self.finished = choice.finished
        self.done = choice.done
        return [(parent, beam.tokens[-1]) for parent, beam in choice.beams]
