"""Progress on a terminal, in a log, and not at all."""

import io
import os
import pty

import pytest

from jaxserve.progress import Bar, Lines, Show, Silent, Unit, reporter


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("show", "stream", "kind"),
    [
        (Show.AUTO, io.StringIO(), Lines),
        (Show.AUTO, Terminal(), Bar),
        (Show.LINES, Terminal(), Lines),
        (Show.BAR, io.StringIO(), Bar),
        (Show.SILENT, Terminal(), Silent),
    ],
)
def test_the_stream_decides_unless_told(show: Show, stream: io.StringIO, kind: type):
    assert type(reporter(show, stream)) is kind


def test_lines_come_every_two_seconds_and_at_the_end():
    out, clock = io.StringIO(), Clock()
    with Lines(out, clock=clock).task("loading", 4_800_000_000) as advance:
        for _ in range(48):
            clock.now_s += 0.125
            advance(100_000_000)
    assert out.getvalue().splitlines() == [
        "loading: 33%, 1.6 GB of 4.8 GB in 2.0 s, 800.0 MB/s",
        "loading: 66%, 3.2 GB of 4.8 GB in 4.0 s, 800.0 MB/s",
        "loading: 100%, 4.8 GB in 6.0 s, 800.0 MB/s",
    ]


def test_short_work_gets_one_line():
    out = io.StringIO()
    with Lines(out, clock=Clock()).task("compiling", 3, Unit.ITEMS) as advance:
        advance(1)
        advance(2)
    assert out.getvalue() == "compiling: 100%, 3 in 0.0 s\n"


def test_work_that_fails_is_not_reported_as_done():
    out = io.StringIO()
    with pytest.raises(ValueError), Lines(out).task("loading", 10) as advance:
        advance(3)
        raise ValueError
    assert out.getvalue() == ""


def test_nothing_to_do_is_done():
    out = io.StringIO()
    with Lines(out, clock=Clock()).task("loading", 0):
        pass
    assert out.getvalue() == "loading: 100%, 0 B in 0.0 s\n"


@pytest.mark.parametrize(("unit", "words"), [(Unit.BYTES, "5.0/5.0 MB"), (Unit.ITEMS, "5000000/")])
def test_the_bar_shows_amount_and_label(unit: Unit, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Bar(out).task("loading [bold] model", 5_000_000, unit) as advance:
        advance(5_000_000)
    assert "loading [bold] model" in out.getvalue()
    assert words in out.getvalue()


END = "<end>"


def test_a_bar_on_a_real_terminal_is_redrawn_in_place(capsys: pytest.CaptureFixture[str]):
    parent, child = pty.openpty()
    with os.fdopen(parent, "rb", buffering=0) as screen, os.fdopen(child, "w") as terminal:
        shown = reporter(stream=terminal)
        assert isinstance(shown, Bar)
        with shown.task("loading", 2_000) as advance:
            print("a result")
            advance(2_000)
        terminal.write(END)
        terminal.flush()
        seen = b""
        while END.encode() not in seen:  # one read returns what has come so far
            seen += screen.read(4096)
    assert b"loading" in seen
    assert b"\x1b[" in seen
    assert b"a result" not in seen
    assert capsys.readouterr().out == "a result\n"


@pytest.mark.parametrize("show", Show)
def test_standard_output_is_left_to_results(show: Show, capsys: pytest.CaptureFixture[str]):
    with reporter(show).task("loading", 10) as advance:
        print("a result")
        advance(10)
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert bool(err) is (show is not Show.SILENT)
