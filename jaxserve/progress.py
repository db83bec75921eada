"""Tells how far long work has come: a bar on a terminal or in a notebook, lines elsewhere.

    with reporter().task("loading tiny", total=11_000_000) as advance:
        advance(4_000_000)

Outside notebooks everything goes to standard error, which leaves standard output to results.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from typing import Any, Protocol, TextIO

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
        show: AUTO is a bar where the stream is a terminal or a notebook, and lines elsewhere.
    """
    if show is Show.SILENT:
        return Silent()
    if show is not Show.LINES and stream is None and (page := notebook()) is not None:
        return Meter(page)
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


class Meter:
    """Draws a bar below a notebook's cell."""

    def __init__(
        self, page: Page, every_s: float = 0.1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._page = page
        self._every_s = every_s
        self._clock = clock

    @contextmanager
    def task(self, label: str, total: int, unit: Unit = Unit.BYTES) -> Iterator[Advance]:
        """Yields a function that moves the bar; work that fails leaves it where it was."""
        start = last = self._clock()
        done = 0
        shown = self._page.show(_meter(label, done, total, unit))

        def advance(amount: int) -> None:
            nonlocal done, last
            done += amount
            now = self._clock()
            if now - last >= self._every_s:
                last = now
                shown(_meter(label, done, total, unit))

        yield advance
        took = self._clock() - start
        shown(f"<div>{html.escape(label)}: {_amount(done, unit)} in {took:.1f} s</div>")


def _meter(label: str, done: int, total: int, unit: Unit) -> str:
    return (
        f'<div>{html.escape(label)} <progress value="{done}" max="{max(total, 1)}"></progress> '
        f"{_amount(done, unit)} of {_amount(total, unit)}</div>"
    )


class Page:
    """A notebook's page, through IPython.

    Attributes:
        cell: number of the cell that runs.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    @property
    def cell(self) -> int:
        """Returns the number of the cell that runs."""
        return self._shell.execution_count

    def show(self, text: str) -> Callable[[str], None]:
        """Returns a function that replaces HTML, which is shown below the running cell."""
        display = sys.modules["IPython"].display
        handle = display.display(display.HTML(text), display_id=True)
        return lambda other: handle.update(display.HTML(other))


def notebook() -> Page | None:
    """Returns the page of the notebook that runs this; None elsewhere, as in IPython's terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return Page(shell) if shell is not None and hasattr(shell, "kernel") else None


class CompileLog:
    """Tells what was compiled: a line each on standard error, in a notebook one that changes."""

    def __init__(self) -> None:
        self._cell: int | None = None
        self._shown: Callable[[str], None] | None = None
        self._count = 0

    def __call__(self, what: str, seconds: float) -> None:
        """Tells of one program."""
        page = notebook()
        if page is None:
            sys.stderr.write(f"compiled {what} in {seconds:.1f} s\n")
            return
        if self._shown is None or self._cell != page.cell:
            self._cell, self._count = page.cell, 0
            self._shown = page.show("")
        self._count += 1
        number = f", {self._count} of this cell" if self._count > 1 else ""
        self._shown(
            f'<div style="opacity:.7">compiled {html.escape(what)} in {seconds:.1f} s{number}</div>'
        )


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
