"""The training loop: steps, progress lines, and checkpoints from which a run goes on exactly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax import Array

from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare, Orientation
from jaxserve.training.dataset import Batches, Tokens
from jaxserve.training.objective import held_out_loss, loss
from jaxserve.training.optimizer import optimizer
from jaxserve.training.schedule import Plan
from jaxserve.training.shapes import Shape

LOG_STEPS = 20
CHECKPOINT_STEPS = 200
"""Also the steps between two looks at the held-out loss."""
HELD_OUT_EVERY = 8
"""The looks during training read one window in eight."""


def training_model(shape: Shape) -> Model:
    """Returns the model as it is trained: float32, every weight apart, outputs first."""
    return Model(shape.config(), Declare("float32", Orientation.OUT_IN, fuse=False))


@dataclass
class State:
    """Where a run stands; only `Trainer.run` writes it.

    Attributes:
        params: master weights.
        optimizer: state of the update rule.
        step: steps done.
    """

    params: Params
    optimizer: Any
    step: int


@dataclass(frozen=True)
class Trainer:
    """One run: what is trained, on what, for how long, and where its checkpoints lie."""

    shape: Shape
    plan: Plan
    train: Tokens
    held_out: Tokens
    seed: int
    folder: Path
    say: Callable[[str], None]

    def fresh(self) -> State:
        """Returns the state before the first step."""
        model = training_model(self.shape)
        params = model.init(jax.random.key(self.seed))
        return State(params, optimizer(model, self.plan).init(params), 0)

    def restored(self) -> State:
        """Returns the state of the newest checkpoint, or the fresh one where there is none."""
        state = self.fresh()
        with self._manager() as manager:
            newest = manager.latest_step()
            if newest is None:
                return state
            tree = {"params": state.params, "optimizer": state.optimizer}
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            found = manager.restore(newest, args=ocp.args.StandardRestore(abstract))
        return State(found["params"], found["optimizer"], newest)

    def run(self, state: State) -> State:
        """Returns the state after the last step, or after the step in which a signal asked to end.

        SIGTERM and SIGINT save a checkpoint first.
        """
        update = _update(training_model(self.shape), self.plan)
        clock = _Clock(state.step)
        with self._manager() as manager, _asked_to_end() as ending:
            while state.step < self.plan.steps and not ending:
                rows = jnp.asarray(self._batches(state.step)[state.step])
                state.params, state.optimizer, last = update(state.params, state.optimizer, rows)
                state.step += 1
                clock.add(last)
                if state.step % LOG_STEPS == 0:
                    self.say(clock.line(state.step, self.plan))
                if state.step % CHECKPOINT_STEPS == 0:
                    self._save(manager, state)
                    self.say(f"step {state.step} held-out {self.look(state):.4f} (one in eight)")
            self._save(manager, state)
        return state

    def look(self, state: State) -> float:
        """Returns a quick held-out loss at the sequence length of the last step, nats per token."""
        length = self.plan.length_at(state.step - 1)
        model = training_model(self.shape)
        return held_out_loss(model, state.params, self.held_out, length, every=HELD_OUT_EVERY)

    def _batches(self, step: int) -> Batches:
        length = self.plan.length_at(step)
        return Batches(self.train, self.plan.batch_tokens // length, length, self.seed)

    @contextmanager
    def _manager(self) -> Iterator[ocp.CheckpointManager]:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        with ocp.CheckpointManager(self.folder.absolute(), options=options) as manager:
            yield manager

    def _save(self, manager: ocp.CheckpointManager, state: State) -> None:
        if manager.latest_step() != state.step:
            tree = {"params": state.params, "optimizer": state.optimizer}
            manager.save(state.step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()


def newest_params(shape: Shape, folder: Path) -> Params:
    """Returns the float32 weights of the newest checkpoint of a run, without optimizer state.

    Raises:
        UsageError: the folder holds no checkpoint.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; give the folder of a training run")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {"params": training_model(shape).abstract_params()},
    )
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.CheckpointManager(folder.absolute()) as manager:
        newest = manager.latest_step()
        if newest is None:
            raise UsageError(f"{folder} holds no checkpoint; train first")
        return manager.restore(newest, args=arguments)["params"]


@lru_cache(maxsize=1)
def _update(model: Model, plan: Plan) -> Callable[[Params, Any, Array], tuple[Params, Any, Array]]:
    """Returns the compiled step: (params, optimizer state, rows) -> (both updated, loss)."""
    rule = optimizer(model, plan)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, rows: Array) -> tuple[Params, Any, Array]:
        value, gradients = jax.value_and_grad(partial(loss, model))(params, rows)
        updates, state = rule.update(gradients, state, params)
        updated: Any = optax.apply_updates(params, updates)
        return updated, state, value

    return update


class _Clock:
    """Mean loss and speed since the last progress line; `Trainer.run` is its writer."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._losses: list[Array] = []
        self._since_s = time.monotonic()

    def add(self, value: Array) -> None:
        """Takes the loss of one step, without waiting for it."""
        self._losses.append(value)

    def line(self, step: int, plan: Plan) -> str:
        """Returns the progress line at `step` and starts anew."""
        mean = float(jnp.mean(jnp.stack(self._losses)))
        elapsed_s = time.monotonic() - self._since_s
        steps = step - self._step
        left_s = (plan.steps - step) * elapsed_s / steps
        self.__init__(step)
        return (
            f"step {step}/{plan.steps} loss {mean:.4f} "
            f"{steps * plan.batch_tokens / elapsed_s:.0f} tokens/s, {left_s / 60:.0f} min left"
        )


@contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """Yields a list that holds the signals received so far; restores the old handlers."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    old = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
