"""Tells how far long work has come: a bar on a terminal, plain lines elsewhere, or nothing.

    with reporter().task("loading tiny", total=11_000_000) as advance:
        advance(4_000_000)

Everything goes to standard error, which leaves standard output to results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from typing import Protocol, TextIO

Advance = Callable[[int], None]
"""Called with the amount of work done since the last call."""


class Show(StrEnum):
    """Where progress goes."""

    AUTO = "auto"
    BAR = "bar"
    LINES = "lines"
    SILENT = "silent"


class Unit(StrEnum):
    """What is counted."""

    BYTES = "bytes"
    ITEMS = "items"


class Reporter(Protocol):
    """Shows the progress of one task at a time."""

    def task(
        self, label: str, total: int, unit: Unit = Unit.BYTES
    ) -> AbstractContextManager[Advance]:
        """Returns a context that shows a task of `total` units while it is open."""
        ...


def reporter(show: Show = Show.AUTO, stream: TextIO | None = None) -> Reporter:
    """Returns a reporter to `stream`, standard error by default.

    Args:
        show: AUTO is a bar where the stream is a terminal, and lines elsewhere.
    """
    if show is Show.SILENT:
        return Silent()
    where = sys.stderr if stream is None else stream
    if show is Show.BAR or (show is Show.AUTO and where.isatty()):
        return Bar(where)
    return Lines(where)


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, label: str, total: int, unit: Unit = Unit.BYTES) -> Iterator[Advance]:
        """Yields a function that does nothing."""
        yield lambda amount: None


class Lines:
    """Writes a line now and then, and one at the end; for logs."""

    def __init__(
        self, stream: TextIO, every_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock

    @contextmanager
    def task(self, label: str, total: int, unit: Unit = Unit.BYTES) -> Iterator[Advance]:
        """Yields a function that may write a line; work that fails gets no last one."""
        start = last = self._clock()
        done = 0

        def advance(amount: int) -> None:
            nonlocal done, last
            done += amount
            now = self._clock()
            if done < total and now - last >= self._every_s:
                last = now
                self._write(label, done, total, now - start, unit)

        yield advance
        self._write(label, done, total, self._clock() - start, unit)

    def _write(self, label: str, done: int, total: int, took_s: float, unit: Unit) -> None:
        share = 100 if total == 0 else 100 * done // total
        amount = _amount(done, unit)
        if done < total:
            amount = f"{amount} of {_amount(total, unit)}"
        rate = f", {_amount(done / took_s, unit)}/s" if took_s > 0 else ""
        print(f"{label}: {share}%, {amount} in {took_s:.1f} s{rate}", file=self._stream, flush=True)


class Bar:
    """Draws a bar with amount, rate and time left; for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def task(self, label: str, total: int, unit: Unit = Unit.BYTES) -> Iterator[Advance]:
        """Yields a function that moves the bar."""
        from rich import console, progress  # only a terminal needs it

        counts: list[progress.ProgressColumn] = [progress.MofNCompleteColumn()]
        if unit is Unit.BYTES:
            counts = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            *counts,
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=console.Console(file=self._stream),
            # Otherwise rich puts itself in the way of what the program prints.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with bar:
            task = bar.add_task(label, total=total)
            yield lambda amount: bar.advance(task, amount)


def _amount(count: float, unit: Unit) -> str:
    """Returns a count for people: 1.5 GB, or 12."""
    if unit is Unit.ITEMS:
        return f"{count:.3g}"
    scaled, prefix = count, ""
    for prefix in ("", "k", "M", "G", "T"):
        if scaled < 1000 or prefix == "T":
            break
        scaled /= 1000
    return f"{scaled:.{0 if not prefix else 1}f} {prefix}B"
