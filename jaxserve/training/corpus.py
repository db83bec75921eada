"""Reads the corpus of the embedded model: the Python standard library that is installed here.

    corpus = read_corpus()
    corpus.train[0].name, corpus.train[0].text      # "__future__.py", "..."

Every machine with Python has this corpus; the released weights name the version they saw (3.12).
Left out: tests, third-party packages, bundled wheels, build tables, and the tables that
`gencodec.py` generates for the single-byte encodings (a megabyte of hexadecimal rows that would
teach nothing but themselves). Added: the texts of `pydoc` topics, the language reference.
"""

from __future__ import annotations

import ast
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import UsageError

HELD_OUT = (
    "argparse.py",
    "asyncio/queues.py",
    "concurrent/futures/thread.py",
    "csv.py",
    "email/feedparser.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "http/client.py",
    "importlib/metadata/__init__.py",
    "json/decoder.py",
    "multiprocessing/pool.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "tkinter/filedialog.py",
    "tomllib/_parser.py",
    "unittest/suite.py",
    "wsgiref/handlers.py",
)
"""Modules no training step and no tokenizer ever sees: about 5% of the bytes, of many kinds."""

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "ensurepip", "idle_test", "lib-dynload", "site-packages", "dist-packages"}
    | {"test", "tests"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_SKIPPED_FILES = frozenset({"html/entities.py"})  # one table of 2,000 names, nothing else
_GENERATED_MARK = "generated from"
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One file of the library, or one topic of its reference."""

    name: str
    """Path below the standard library, or `topics/NAME`; POSIX separators."""
    text: str


@dataclass(frozen=True)
class Corpus:
    """The documents, split by the fixed list `HELD_OUT`; both parts sorted by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def read_corpus(stdlib: Path | None = None) -> Corpus:
    """Returns the corpus below `stdlib` (default: the running interpreter's library).

    Raises:
        UsageError: the folder holds no Python standard library.
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    if not (root / "argparse.py").is_file():
        raise UsageError(f"{root} holds no Python standard library; pass --stdlib LIB/python3.12")
    documents = sorted(_distinct(_files(root)), key=lambda document: document.name)
    held_out = frozenset(HELD_OUT)
    return Corpus(
        train=tuple(d for d in documents if d.name not in held_out) + tuple(_topics(root)),
        held_out=tuple(d for d in documents if d.name in held_out),
    )


def _files(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        name = relative.as_posix()
        if name in _SKIPPED_FILES or name == _TOPICS or name.startswith(_SKIPPED_PREFIXES):
            continue
        with tokenize.open(path) as file:
            text = file.read()
        if relative.parts[0] == "encodings" and _GENERATED_MARK in text[:200]:
            continue
        if text.strip():
            yield Document(name, text)


def _distinct(documents: Iterator[Document]) -> list[Document]:
    """Returns the documents without exact copies; a held-out name wins over its copies."""
    held_out = frozenset(HELD_OUT)
    ordered = sorted(documents, key=lambda document: (document.name not in held_out, document.name))
    by_text: dict[str, Document] = {}
    for document in ordered:
        by_text.setdefault(document.text, document)
    return list(by_text.values())


def _topics(root: Path) -> list[Document]:
    """Returns the topic texts, without topics that a longer topic contains word for word."""
    path = root / _TOPICS
    if not path.is_file():
        return []
    module = ast.parse(path.read_text(encoding="utf-8"))
    values = [node.value for node in module.body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(values[0])
    kept: list[Document] = []
    for name, text in sorted(topics.items()):
        _, _, body = text.strip().partition("\n\n")
        inside = (body in other for key, other in topics.items() if key != name)
        if len(body) > 0 and not any(inside):
            kept.append(Document(f"topics/{name}", text.strip() + "\n"))
    return kept
