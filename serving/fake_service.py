"""A service without a model, for tests of servers: every answer can be found by hand.

    async with fake_service() as service:
        answer = await Answer.open(service, service.intake.request("abc", SamplingParams()))

Its tokenizer has one token per byte, and one more that ends a text. Its tokens follow
`fake_runner.FakeRule`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import jaxserve
from jaxserve.checkpoint.generation_config import GenerationDefaults
from jaxserve.serving.engine import Engine
from jaxserve.serving.engine_process import serve
from jaxserve.serving.fake_runner import FakeRunner
from jaxserve.serving.intake import Intake
from jaxserve.serving.made import Follows, Made
from jaxserve.serving.multihost.follower import Follower
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.multihost.join import join
from jaxserve.serving.multihost.leading_runner import LeadingRunner
from jaxserve.serving.multihost.messages import Identity
from jaxserve.serving.multihost.ranks import Ranks, breaking_off
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import SchedulerConfig, StepPlan
from jaxserve.serving.service import LocalService, ModelCard
from jaxserve.serving.supervisor import Backoff, RemoteService
from jaxserve.serving.wire import Start
from jaxserve.tokenizer import Tokenizer

END_ID = 256
VOCAB_SIZE = 257
CONTEXT = 512
FOREVER_S = 1e8
COMMAND = (sys.executable, "-m", "jaxserve.serving.fake_service")
_IDENTITY = dict.fromkeys(("jaxserve", "jax", "jaxlib", "libtpu", "python"), "1")
_IDENTITY |= {"layout": "ab", "model": "cd"}
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@cache
def byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer with a token per byte; token 256 ends a text."""
    vocabulary = {char: byte for byte, char in enumerate(_alphabet())}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    with tempfile.TemporaryDirectory() as folder:
        library.save(str(Path(folder) / "tokenizer.json"))
        config = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.from_dir(folder)


def _alphabet() -> list[str]:
    """Returns the character that stands for each byte in a byte-level vocabulary."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def fake_intake() -> Intake:
    """Returns the intake of the model that is none."""
    return Intake(VOCAB_SIZE, CONTEXT, byte_tokenizer(), GenerationDefaults(), (END_ID,))


def fake_card(name: str = "fake") -> ModelCard:
    """Returns the card of the model that is none."""
    return ModelCard(
        name=name,
        created=1_700_000_000,
        architecture="fake",
        dtype="float32",
        max_context_tokens=CONTEXT,
        vocab_size=VOCAB_SIZE,
        num_parameters=0,
    )


class TrickRunner(FakeRunner):
    """A `FakeRunner` that a prompt can hang or kill.

    Attributes:
        hang_id, wait_id, die_id: a prompt with this token is never given to the device, makes the
            step last forever there, or ends the process.
    """

    hang_id: int | None = None
    wait_id: int | None = None
    die_id: int | None = None

    def dispatch(self, plan: StepPlan) -> Any:
        """Returns a ticket, or does not."""
        if self.hang_id in plan.tokens:
            time.sleep(FOREVER_S)
        if self.die_id in plan.tokens:
            os._exit(3)
        ticket = super().dispatch(plan)
        return replace(ticket, ready_s=FOREVER_S) if self.wait_id in plan.tokens else ticket


def fake_engine(step_s: float = 0.0, **fields: Any) -> Engine:
    """Returns an engine over a `FakeRunner`, not started; arguments as `fake_runner`."""
    runner, config = fake_runner(step_s, **fields)
    return Engine(runner, config)


def fake_runner(
    step_s: float = 0.0,
    hang_id: int | None = None,
    wait_id: int | None = None,
    die_id: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    **changes: Any,
) -> tuple[TrickRunner, SchedulerConfig]:
    """Returns a runner, and the limits of its scheduler.

    Args:
        step_s: seconds of a step.
        hang_id, wait_id, die_id: see `TrickRunner`.
        vocab_size: of its arithmetic.
        changes: fields of `SchedulerConfig`.
    """
    fields: dict[str, Any] = {
        "page_size": 16,
        "groups": (GroupLimits(num_pages=256),),
        "num_slots": 8,
        "max_step_tokens": 64,
        "max_context_tokens": CONTEXT,
    }
    config = SchedulerConfig(**(fields | changes))
    runner = TrickRunner(config, vocab_size, step_s)
    runner.hang_id, runner.wait_id, runner.die_id = hang_id, wait_id, die_id
    return runner, config


@asynccontextmanager
async def fake_service(step_s: float = 0.0, **changes: Any) -> AsyncIterator[LocalService]:
    """Yields a started service; arguments as `fake_engine`."""
    service = LocalService(fake_engine(step_s, **changes), fake_intake(), fake_card())
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def remote_fake(
    backoff: Backoff | None = None, group: Group | None = None, **fields: Any
) -> RemoteService:
    """Returns a service whose fake engine runs in a process of its own; it is not started.

    Args:
        group: the processes that serve together; this one is rank 0.
        fields: as of `fake_start`.
    """
    return RemoteService(fake_start(group, **fields), fake_intake(), fake_card(), COMMAND, backoff)


def fake_start(group: Group | None = None, **fields: Any) -> Start:
    """Returns what starts a process of a fake engine.

    Args:
        fields: as of `fake_runner`; and of a rank `identity`, what it differs in from its group,
            and `load_s`, how long it loads.
    """
    groups = [limits.num_pages for limits in fields.pop("groups", ())]
    return Start(json.dumps(fields | ({"num_pages": groups} if groups else {})), group=group)


def _build(
    start: Start, phase: Callable[[str], None], joined: Callable[[Ranks], None]
) -> Made | Follows:
    phase("fake")
    fields = json.loads(start.model)
    if pages := fields.pop("num_pages", None):
        fields["groups"] = tuple(map(GroupLimits, pages))
    info = {"versions": {"jaxserve": jaxserve.__version__}}
    identity, load_s = _IDENTITY | fields.pop("identity", {}), fields.pop("load_s", 0.0)
    if start.group is None:
        return Made(fake_engine(**fields), info)
    same = Identity(num_processes=start.group.num_processes, **identity)
    ranks = join(start.group, same, phase)
    joined(ranks)
    with breaking_off(ranks):
        time.sleep(load_s)
        runner, config = fake_runner(**fields)
        ranks.agree("ready")
        ranks.serve()
    if isinstance(ranks, Follower):
        return Follows(ranks, partial(ranks.follow, runner, config.max_in_flight), info)
    return Made(Engine(LeadingRunner(runner, ranks), config), info, ranks=ranks)


if __name__ == "__main__":
    os._exit(serve(int(sys.argv[1]), _build))
