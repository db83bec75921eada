"""Rank 0's runner: what it dispatches all ranks dispatch.

engine = Engine(LeadingRunner(runner, leader), config)
"""

from __future__ import annotations

import logging
from typing import Any

from jaxserve.serving.multihost.digest import TokenDigest
from jaxserve.serving.multihost.leader import Leader
from jaxserve.serving.multihost.messages import GroupLostError
from jaxserve.serving.plan import StepPlan
from jaxserve.serving.runner import Runner, StepResult

_log = logging.getLogger(__name__)


class LeadingRunner:
    """A runner whose every plan all ranks run; the engine's thread alone calls it."""

    def __init__(self, runner: Runner, leader: Leader) -> None:
        self._runner = runner
        self._leader = leader
        self._digest = TokenDigest()

    def dispatch(self, plan: StepPlan) -> Any:
        """Returns a ticket, once the plan is on its way to the others and to the device."""
        self._leader.note_open(self._digest.place(plan.number))
        self._leader.broadcast(plan)
        try:
            ticket = plan.number, self._runner.dispatch(plan)
        except Exception as error:
            raise self._lost(error) from error
        self._leader.note_begun(self._digest.place(plan.number))
        return ticket

    def collect(self, ticket: Any) -> StepResult:
        """Returns the results, once they are there."""
        number, own = ticket
        try:
            result = self._runner.collect(own)
        except Exception as error:
            raise self._lost(error) from error
        self._leader.note_done(*self._digest.add(number, result.tokens))
        return result

    def reset(self) -> None:
        """Forgets pages and slots, on all ranks."""
        self._leader.reset()
        self._digest = self._digest.next()
        self._runner.reset()

    def _lost(self, error: Exception) -> GroupLostError:
        """Ends the group: the others have run a step that failed here."""
        _log.error("a step failed", exc_info=error)
        self._leader.lose(f"a step failed on rank 0 ({type(error).__name__})")
        return GroupLostError("a step failed on rank 0")
