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
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import jaxserve
from jaxserve.checkpoint.generation_config import GenerationDefaults
from jaxserve.serving.engine import Engine
from jaxserve.serving.engine_process import Made, serve
from jaxserve.serving.fake_runner import FakeRunner
from jaxserve.serving.intake import Intake
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import SchedulerConfig, StepPlan
from jaxserve.serving.service import LocalService, ModelCard
from jaxserve.serving.supervisor import Backoff, RemoteService
from jaxserve.serving.wire import Start
from jaxserve.tokenizer import Tokenizer

END_ID = 256
VOCAB_SIZE = 257
CONTEXT = 512
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
        hang_id, die_id: a prompt with this token makes the step last forever, or ends the process.
    """

    hang_id: int | None = None
    die_id: int | None = None

    def dispatch(self, plan: StepPlan) -> Any:
        """Returns a ticket, or does not."""
        if self.hang_id in plan.tokens:
            time.sleep(1e6)
        if self.die_id in plan.tokens:
            os._exit(3)
        return super().dispatch(plan)


def fake_engine(
    step_s: float = 0.0, hang_id: int | None = None, die_id: int | None = None, **changes: Any
) -> Engine:
    """Returns an engine over a `FakeRunner`, not started.

    Args:
        step_s: seconds of a step.
        hang_id, die_id: see `TrickRunner`.
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
    runner = TrickRunner(config, VOCAB_SIZE, step_s)
    runner.hang_id, runner.die_id = hang_id, die_id
    return Engine(runner, config)


@asynccontextmanager
async def fake_service(step_s: float = 0.0, **changes: Any) -> AsyncIterator[LocalService]:
    """Yields a started service; arguments as `fake_engine`."""
    service = LocalService(fake_engine(step_s, **changes), fake_intake(), fake_card())
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def remote_fake(backoff: Backoff | None = None, **fields: Any) -> RemoteService:
    """Returns a service whose fake engine runs in a process of its own; it is not started.

    Args:
        fields: as of `fake_engine`.
    """
    groups = [group.num_pages for group in fields.pop("groups", ())]
    start = Start(json.dumps(fields | ({"num_pages": groups} if groups else {})))
    command = (sys.executable, "-m", "jaxserve.serving.fake_service")
    return RemoteService(start, fake_intake(), fake_card(), command, backoff)


def _build(start: Start, phase: Callable[[str], None]) -> Made:
    phase("fake")
    fields = json.loads(start.model)
    if pages := fields.pop("num_pages", None):
        fields["groups"] = tuple(map(GroupLimits, pages))
    return Made(fake_engine(**fields), {"versions": {"jaxserve": jaxserve.__version__}})


if __name__ == "__main__":
    os._exit(serve(int(sys.argv[1]), _build))
