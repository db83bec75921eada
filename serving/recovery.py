"""Whether an engine that was lost is still expected back. Pure.

recovery = Recovery(within_s=600.0)
recovery.given_up(failed=True, restarts=2, now_s=time.monotonic())
"""

from __future__ import annotations

MOST_RESTARTS = 3


class Recovery:
    """Watches an engine that its supervisor starts again; whoever asks is its single writer.

    A restart loads and compiles as a start does, and whoever replaced the whole server meanwhile
    would begin that anew.

    Args:
        within_s: how long a start may take.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._lost: tuple[float, int] | None = None

    def given_up(self, failed: bool, restarts: int, now_s: float) -> bool:
        """Returns whether a lost engine is not back in time, or dies of every start.

        Args:
            failed: the engine was lost and is not back.
            restarts: how often it was started again, since ever.
        """
        if not failed:
            self._lost = None
            return False
        since_s, before = self._lost = self._lost or (now_s, restarts)
        return now_s - since_s > self._within_s or restarts - before > MOST_RESTARTS
