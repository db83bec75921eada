"""Runs what README.md, docs/ and deploy/ tell a reader to type.

Of a page, each ```python block runs in one namespace, and each ```console block runs in one
folder that is thrown away, lines that begin with `$` being the commands. A block that cannot run
here gives the reason after its language: ```console not run: downloads a model.
`make` and `pip` lines are checked against the Makefile and the extras instead of being run.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\S+)[ \t]*(.*?)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND_TIMEOUT_S = 300
LONG = {"benchmarks", "quantization", "tiny"}
"""Pages whose commands measure or load many times; slow tests run those."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what follows the language, its text and first line."""

    language: str
    note: str
    text: str
    line: int


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "deploy/README.md"]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m[1], m[2], m[3], text.count("\n", 0, m.start(3)) + 1) for m in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[str]:
    """Yields the commands of a console block, lines ending in a backslash joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    marked = [line[2:] for line in lines if line.startswith("$ ")]
    assert marked, f"line {block.line}: a console block marks its commands with `$ `"
    yield from marked


def runs(block: Block) -> bool:
    if block.note:
        assert block.note.startswith("not run: "), f"line {block.line}: {block.note!r}"
    return not block.note


def shell_environment() -> dict[str, str]:
    """Returns the environment of a reader at a terminal: our commands, one device."""
    hidden = ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def check_make(target: str) -> None:
    listed = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target in listed


def check_pip(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,-]+)\]", command):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), command


def run_command(command: str, folder: Path) -> None:
    if made := re.match(r"(?:\w+=\S+ )*make ([a-z-]+)$", command):
        return check_make(made[1])
    if re.match(r"(python -m )?pip install ", command):
        return check_pip(command)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=shell_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"


def console_pages() -> list[Any]:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(page, marks=marks[page.stem in LONG], id=page.stem) for page in pages()]


@pytest.mark.parametrize("page", console_pages())
def test_console_blocks_run(page: Path, tmp_path: Path):
    for block in blocks(page):
        if block.language in {"console", "sh", "bash", "shell"} and runs(block):
            assert block.language == "console", f"line {block.line}: use ```console"
            for command in commands(block):
                run_command(command, tmp_path)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language in {"python", "py"} and runs(block):
            # Blank lines before the text make tracebacks name the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    targets = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []
