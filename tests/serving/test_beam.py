"""Beam search: against every possible continuation, against Hugging Face, and in the engine."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import msgspec
import pytest

from jaxserve.errors import UsageError
from jaxserve.serving.beam import (
    Beam,
    BeamRules,
    BeamSearch,
    Candidate,
    Hypothesis,
    beam_rules,
    choose,
)
from jaxserve.serving.engine import Engine
from jaxserve.serving.fake_runner import FakeRunner
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import SchedulerConfig
from jaxserve.serving.request import Request, SamplingParams, TokenEvent

Tokens = tuple[int, ...]
Model = Callable[[Tokens], tuple[Candidate, ...]]


def model(seed: int, vocab_size: int, sharpness: float = 1.0) -> Model:
    """Returns a function: tokens so far -> every token with its log-probability."""

    @cache
    def after(tokens: Tokens) -> tuple[Candidate, ...]:
        rng = random.Random(f"{seed} {tokens}")
        logits = [rng.gauss(0, sharpness) for _ in range(vocab_size)]
        norm = math.log(sum(math.exp(x) for x in logits))
        return tuple((token, x - norm) for token, x in enumerate(logits))

    return after


def run(rules: BeamRules, after: Model) -> list[Hypothesis]:
    """Returns the hypotheses of a search that sees only the candidates it asks for."""
    search = BeamSearch(rules)
    while not search.done:
        likeliest = [sorted(after(beam.tokens), key=lambda c: -c[1]) for beam in search.beams]
        search.step([candidates[: rules.num_candidates] for candidates in likeliest])
    return search.finished


def every_ending(rules: BeamRules, after: Model, vocab_size: int) -> Iterator[tuple[float, Tokens]]:
    """Yields (score, tokens) of everything that can be said."""
    for length in range(1, rules.max_tokens + 1):
        for tokens in product(range(vocab_size), repeat=length):
            stopped = tokens[-1] in rules.stop_ids and length > rules.min_tokens
            early = any(token in rules.stop_ids for token in tokens[:-1])
            banned = tokens[-1] in rules.stop_ids and length <= rules.min_tokens
            if not early and not banned and (stopped or length == rules.max_tokens):
                total = sum(dict(after(tokens[:at]))[token] for at, token in enumerate(tokens))
                yield total / length**rules.length_penalty, tokens


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("min_tokens", [0, 2])
def test_a_search_wider_than_the_tree_finds_the_best_of_all(
    length_penalty: float, min_tokens: int
) -> None:
    rules = BeamRules(
        width=81,
        max_tokens=4,
        min_tokens=min_tokens,
        stop_ids=frozenset({0}),
        length_penalty=length_penalty,
    )
    after = model(3, vocab_size=3)
    found = run(rules, after)
    wanted = sorted(every_ending(rules, after, 3), reverse=True)
    assert [h.beam.tokens for h in found] == [tokens for _, tokens in wanted]
    assert [h.score for h in found] == pytest.approx([score for score, _ in wanted])
    assert [h.stopped for h in found] == [tokens[-1] == 0 for _, tokens in wanted]


def test_a_narrow_search_misses_what_begins_badly() -> None:
    # 1 begins better than 2, but all that follows it is unlikely.
    table: dict[Tokens, tuple[Candidate, ...]] = {
        (): ((1, math.log(0.6)), (2, math.log(0.4)), (0, math.log(1e-9))),
        (1,): ((1, math.log(0.4)), (2, math.log(0.35)), (0, math.log(0.25))),
        (2,): ((0, math.log(0.9)), (1, math.log(0.06)), (2, math.log(0.04))),
    }
    rules = BeamRules(width=1, max_tokens=2, stop_ids=frozenset({0}))
    assert run(rules, table.__getitem__)[0].beam.tokens == (1, 1)
    wide = BeamRules(width=2, max_tokens=2, stop_ids=frozenset({0}))
    best = run(wide, table.__getitem__)[0]
    assert best.beam.tokens == (2, 0)
    assert best.score == pytest.approx(math.log(0.36) / 2)
    assert best.stopped


def test_a_stop_token_that_is_not_among_the_first_ends_nothing() -> None:
    rules = BeamRules(width=2, max_tokens=9, stop_ids=frozenset({0}))
    candidates = [(1, -1.0), (2, -1.5), (0, -2.0), (3, -3.0)]
    choice = choose(rules, [Beam()], [candidates], [])
    assert [beam.tokens for _, beam in choice.beams] == [(1,), (2,)]
    assert choice.finished == []


def test_a_full_list_that_no_beam_can_beat_ends_the_search() -> None:
    rules = BeamRules(width=2, max_tokens=9, stop_ids=frozenset({0}))
    beams = [Beam((1,), (-1.0,), -1.0), Beam((2,), (-1.1,), -1.1)]
    finished = [Hypothesis(Beam((0,), (-0.5,), -0.5), -0.5, True)]
    # The second hypothesis scores (-1.0 - 0.2) / 2 = -0.6; the best beam lives on at -2.1 / 2.
    over = [[(0, -0.2), (3, -2.0)], [(3, -1.0), (4, -9.0)]]
    assert choose(rules, beams, over, finished).done
    # With the best beam at -1.15 / 2 it may still overtake.
    open_end = [[(0, -0.2), (3, -0.15)], [(3, -1.0), (4, -9.0)]]
    choice = choose(rules, beams, open_end, finished)
    assert not choice.done
    assert [(parent, beam.tokens) for parent, beam in choice.beams] == [(0, (1, 3)), (1, (2, 3))]


def test_enough_candidates_are_asked_for_when_many_tokens_stop() -> None:
    assert BeamRules(width=2, max_tokens=1, stop_ids=frozenset(range(5))).num_candidates == 7
    assert BeamRules(width=4, max_tokens=1, stop_ids=frozenset({0})).num_candidates == 8


def test_a_vocabulary_of_stop_tokens_ends_the_search_at_once() -> None:
    rules = BeamRules(width=3, max_tokens=9, stop_ids=frozenset({0, 1}))
    search = BeamSearch(rules)
    assert search.step([[(0, -0.1), (1, -2.4)]]) == []
    assert search.done
    assert [h.beam.tokens for h in search.finished] == [(0,), (1,)]


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """Returns Hugging Face's beam search over one of our models."""
    torch = pytest.importorskip("torch", reason="torch, the reference's framework, is missing")
    theirs: Any = pytest.importorskip("transformers")

    class Config(theirs.PretrainedConfig):
        model_type = "table"

    class Table(theirs.PreTrainedModel, theirs.GenerationMixin):
        config_class = Config

        def __init__(self, config: Config, after: Model) -> None:
            super().__init__(config)
            self.after = after
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Any, **unused: Any) -> Any:
            rows = [
                [logprob for _, logprob in self.after(tuple(r[1:]))] for r in input_ids.tolist()
            ]
            return theirs.modeling_outputs.CausalLMOutput(logits=torch.tensor(rows)[:, None])

        def prepare_inputs_for_generation(
            self, input_ids: Any, attention_mask: Any = None, **unused: Any
        ) -> Any:
            return {"input_ids": input_ids}

    def search(rules: BeamRules, after: Model, vocab_size: int) -> list[tuple[Tokens, float]]:
        stops = sorted(rules.stop_ids)
        config = theirs.GenerationConfig(
            num_beams=rules.width,
            num_return_sequences=rules.width,
            max_new_tokens=rules.max_tokens,
            min_new_tokens=rules.min_tokens or None,
            length_penalty=rules.length_penalty,
            eos_token_id=stops,
            pad_token_id=stops[0],
            early_stopping=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = Table(Config(vocab_size=vocab_size), after).generate(
            torch.tensor([[1]]), generation_config=config, attention_mask=torch.ones(1, 1)
        )
        return [
            (_to_first_stop(tokens[1:], rules.stop_ids), score)
            for tokens, score in zip(
                found.sequences.tolist(), found.sequences_scores.tolist(), strict=True
            )
        ]

    return search


def _to_first_stop(tokens: list[int], stop_ids: frozenset[int]) -> Tokens:
    for at, token in enumerate(tokens):
        if token in stop_ids:
            return tuple(tokens[: at + 1])
    return tuple(tokens)


@pytest.mark.filterwarnings("ignore")  # other people's warnings
@pytest.mark.parametrize("seed", range(12))
def test_hypotheses_are_those_of_hugging_face(seed: int, hugging_face: Any) -> None:
    rng = random.Random(seed)
    vocab_size = rng.choice([20, 30])
    max_tokens = rng.randint(1, 9)
    rules = BeamRules(
        width=rng.choice([2, 3, 5]),
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, rng.choice([0, 0, 3])),
        stop_ids=frozenset(rng.sample(range(vocab_size), rng.choice([1, 1, 3]))),
        length_penalty=rng.choice([1.0, 0.0, 2.0, -1.0]),
    )
    after = model(seed, vocab_size, sharpness=rng.choice([0.3, 1.0, 2.0]))
    wanted = hugging_face(rules, after, vocab_size)
    found = run(rules, after)
    assert [h.beam.tokens for h in found] == [tokens for tokens, _ in wanted]
    assert [h.score for h in found] == pytest.approx([score for _, score in wanted], abs=1e-4)


# In the engine, over a runner whose log-probabilities can be found by hand.


def limits(**changes: Any) -> SchedulerConfig:
    fields: dict[str, Any] = {
        "page_size": 2,
        "groups": (GroupLimits(num_pages=64),),
        "num_slots": 6,
        "max_step_tokens": 16,
        "max_context_tokens": 32,
    }
    return SchedulerConfig(**(fields | changes))


def search_for(
    name: str,
    prompt: Tokens,
    width: int,
    max_tokens: int,
    stop_ids: Tokens = (),
    **fields: Any,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=1, **fields).resolved({})
    return Request(id=name, prompt=prompt, params=params, stop_ids=stop_ids, beam_width=width)


def serve(
    config: SchedulerConfig, vocab_size: int, requests: Sequence[Request], penalty: float = 1.0
) -> tuple[Engine, FakeRunner, dict[str, list[TokenEvent]]]:
    """Returns (engine, runner, events by request) after the requests were served."""
    runner = FakeRunner(config, vocab_size)
    engine = Engine(runner, config)
    events: dict[str, list[TokenEvent]] = {}
    for request in requests:
        events[request.id] = []
        request = msgspec.structs.replace(request, length_penalty=penalty)
        engine.submit(request, events[request.id].append)
    while engine.step():
        engine._scheduler.check()
    assert sum(engine.metrics.scheduler.pages_held) == 0
    assert not engine.busy
    return engine, runner, events


def score(event: TokenEvent, penalty: float = 1.0) -> float:
    assert event.logprobs is not None
    assert [entry.token_id for entry in event.logprobs] == list(event.token_ids)
    return sum(entry.logprob for entry in event.logprobs) / len(event.token_ids) ** penalty


def after_prompt(runner: FakeRunner, prompt: Tokens) -> Model:
    """Returns the runner's log-probabilities after a prompt and what follows it, by hand."""
    return lambda tokens: tuple(sorted(runner.rule.logprobs(runner.rule.peak(prompt + tokens))))


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_the_engine_finds_the_best_of_everything_that_can_be_said(penalty: float) -> None:
    # 5 tokens, of which one stops, and 3 steps: 4 + 16 beams, so width 10 prunes only the worst.
    prompt = (3, 1, 4)
    request = search_for("a", prompt, width=10, max_tokens=3, stop_ids=(0,))
    _, runner, events = serve(limits(num_slots=10), 5, [request], penalty)
    rules = beam_rules(msgspec.structs.replace(request, length_penalty=penalty))
    everything = sorted(every_ending(rules, after_prompt(runner, prompt), 5), reverse=True)
    found = events["a"]
    assert found[0].token_ids == everything[0][1]
    assert score(found[0], penalty) == pytest.approx(everything[0][0])
    assert len(found) == 10
    known = {tokens: value for value, tokens in everything}
    assert [score(event, penalty) for event in found] == pytest.approx(
        [known[event.token_ids] for event in found]
    )


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_in_flight": 1},
        {"page_size": 4, "max_prefill_tokens": 3},
        {"groups": (GroupLimits(num_pages=20),)},
        {"groups": (GroupLimits(num_pages=64), GroupLimits(num_pages=64, window=5))},
        {"num_slots": 2},
        {"tokens_per_step": 2},
    ],
    ids=["plain", "no run-ahead", "chunks", "few pages", "window", "few slots", "two tokens"],
)
def test_beams_among_other_requests_are_those_found_without_pages(
    width: int, changes: dict[str, Any]
) -> None:
    prompts = [(3, 1, 4, 1, 5), (2, 7, 1, 8), (3, 1, 4, 1, 6)]
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        stops = (5 * number, 3)
        requests.append(search_for(f"beams {number}", prompt, width, 9, stops, min_tokens=number))
        requests.append(search_for(f"plain {number}", prompt, 1, 12))
    config = limits(**changes)
    _, runner, events = serve(config, 23, requests)
    for request in requests:
        after = after_prompt(runner, request.prompt)
        if request.beam_width == 1:
            tokens = [token for event in events[request.id] for token in event.token_ids]
            assert tokens == runner.rule.continue_prompt(request.prompt, request.params, 12)
            continue
        wanted = run(beam_rules(request), after)
        found = events[request.id]
        assert [event.token_ids for event in found] == [h.beam.tokens for h in wanted]
        assert [score(event) for event in found] == pytest.approx([h.score for h in wanted])
        assert [event.sample_index for event in found] == list(range(width))
        assert [event.stop_token for event in found] == [h.stopped for h in wanted]
        reasons = ["stop" if h.stopped else "length" for h in wanted]
        assert [event.finish_reason for event in found] == reasons


def test_a_search_tells_the_log_probabilities_of_its_prompt_once() -> None:
    prompt = (3, 1, 4, 1, 5)
    request = search_for("a", prompt, width=3, max_tokens=4, prompt_logprobs=2)
    _, runner, events = serve(limits(max_prefill_tokens=2), 23, [request])
    first, *later = [event.prompt_logprobs for event in events["a"]]
    assert later == [None, None]
    assert first is not None
    assert first[0] is None
    assert list(first[1:]) == [
        runner.rule.logprob(runner.rule.peak(prompt[:at]), prompt[at], 2) for at in range(1, 5)
    ]


def test_the_context_ends_a_search() -> None:
    request = search_for("a", (1,) * 28, width=3, max_tokens=20)
    _, _, events = serve(limits(), 23, [request])
    assert [len(event.token_ids) for event in events["a"]] == [4, 4, 4]
    assert {event.finish_reason for event in events["a"]} == {"length"}


def test_every_hypothesis_of_a_search_has_an_end_even_where_there_are_too_few() -> None:
    request = search_for("a", (1,), width=4, max_tokens=1)
    engine, _, events = serve(limits(), 3, [request])
    assert [len(event.token_ids) for event in events["a"]] == [1, 1, 1, 0]
    assert engine.metrics.finished == {"length": 4}


def test_an_aborted_search_frees_its_pages() -> None:
    config = limits()
    engine = Engine(FakeRunner(config, 23), config)
    events: list[TokenEvent] = []
    engine.submit(search_for("a", (1, 2, 3), width=3, max_tokens=20), events.append)
    for _ in range(6):
        engine.step()
    assert sum(engine.metrics.scheduler.pages_held) > 0
    engine.abort("a")
    engine.step()
    assert sum(engine.metrics.scheduler.pages_held) == 0
    assert [event.finish_reason for event in events] == ["abort"] * 3


def test_beams_hold_fewer_pages_than_as_many_requests() -> None:
    config = limits(page_size=4, max_context_tokens=64)
    engine = Engine(FakeRunner(config, 23), config)
    engine.submit(search_for("a", (1, 2, 3) * 10, width=4, max_tokens=8), lambda event: None)
    most_held = most_unshared = 0
    while engine.step():
        stats = engine.metrics.scheduler
        most_held = max(most_held, stats.pages_held[0])
        most_unshared = max(most_unshared, stats.page_references[0])
    # 30 tokens are 7 full pages and a part; all four beams share the full ones.
    assert most_unshared == 4 * 10
    assert most_held <= 7 + 4 * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 11}, "beam_width=11 with 0 stop tokens needs 22 candidates"),
        ({"width": 3, "stop_ids": tuple(range(18))}, "18 stop tokens needs 21 candidates"),
        ({"width": 3, "frequency_penalty": 0.5}, "frequency_penalty=0.5 has no effect on beams"),
        ({"width": 3, "logit_bias": {1: 2.0}}, "logit_bias"),
        ({"width": 3, "repetition_penalty": 1.5}, "repetition_penalty=1.5"),
        ({"width": 3, "stop": ("x",)}, "stop"),
    ],
)
def test_a_search_refuses_what_it_cannot_do(fields: dict[str, Any], message: str) -> None:
    engine = Engine(FakeRunner(limits(), 23), limits())
    with pytest.raises(UsageError, match=message):
        engine.submit(search_for("a", (1, 2), max_tokens=4, **fields), lambda event: None)
    assert not engine.busy
