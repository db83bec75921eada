from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.errors import UsageError
from jaxserve.training.corpus import HELD_OUT, read_corpus


def library(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"argparse.py": "held = 1\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def names(root: Path) -> list[str]:
    return [document.name for document in read_corpus(root).train]


def test_tests_third_party_code_and_tables_are_left_out(tmp_path: Path) -> None:
    root = library(
        tmp_path,
        {
            "abc.py": "kept = 1\n",
            "test/test_abc.py": "a = 1\n",
            "unittest/test/x.py": "a = 2\n",
            "idlelib/idle_test/x.py": "a = 3\n",
            "site-packages/numpy/x.py": "a = 4\n",
            "ensurepip/__init__.py": "a = 5\n",
            "_sysconfigdata__linux.py": "a = 6\n",
            "config-3.12/python-config.py": "a = 7\n",
            "html/entities.py": "a = 8\n",
            "encodings/cp037.py": '""" Codec generated from X with gencodec.py. """\n',
            "encodings/utf_8.py": "kept = 2\n",
            "empty/__init__.py": "",
        },
    )
    assert names(root) == ["abc.py", "encodings/utf_8.py"]


def test_held_out_modules_and_their_copies_are_not_trained_on(tmp_path: Path) -> None:
    root = library(tmp_path, {"abc.py": "kept = 1\n", "aaa_copy.py": "held = 1\n"})
    corpus = read_corpus(root)
    assert [d.name for d in corpus.train] == ["abc.py"]
    assert [d.name for d in corpus.held_out] == ["argparse.py"]


def test_identical_files_appear_once(tmp_path: Path) -> None:
    assert names(library(tmp_path, {"a.py": "x = 1\n", "b.py": "x = 1\n"})) == ["a.py"]


def test_topics_are_texts_and_a_topic_inside_another_is_dropped(tmp_path: Path) -> None:
    source = (
        "topics = {'if': 'The if statement\\n****\\n\\nif x: y\\n', "
        "'compound': 'Compound\\n***\\n\\nAll.\\n\\nif x: y\\n'}\n"
    )
    root = library(tmp_path, {"pydoc_data/topics.py": source})
    assert [(d.name, d.text) for d in read_corpus(root).train] == [
        ("topics/compound", "Compound\n***\n\nAll.\n\nif x: y\n")
    ]


def test_this_library_holds_the_held_out_modules() -> None:
    corpus = read_corpus()
    found = {document.name for document in corpus.held_out}
    assert len(found) >= len(HELD_OUT) - 2  # later Pythons move a module or two
    sizes = [sum(len(d.text) for d in part) for part in (corpus.held_out, corpus.train)]
    assert 0.03 < sizes[0] / sizes[1] < 0.08
    assert [d.name for d in corpus.held_out] == sorted(found)


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--stdlib"):
        read_corpus(tmp_path)
