import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve import compile_cache
from jaxserve.errors import UsageError

PROGRAM = """
import json, logging, sys
logging.basicConfig(stream=sys.stderr)
from jaxserve import compile_cache
compile_cache.enable()
import jax
jax.jit(lambda x: x * 2 + 1)(3.0)
print(json.dumps(jax.config.jax_compilation_cache_dir))
"""


def run(**settings: str) -> tuple[str | None, str]:
    """Returns the cache folder that a fresh process ends up with, and its standard error."""
    hidden = ("JAXSERVE_", "JAX_COMPILATION", "JAX_PERSISTENT", "XDG_CACHE_HOME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=kept | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAXSERVE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert compile_cache.directory() == Path("/somewhere/.cache/jaxserve/xla")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compile_cache.directory() == Path("/somewhere/.cache/jaxserve/xla")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compile_cache.directory() == Path("/caches/jaxserve/xla")
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", "~/mine")
    assert compile_cache.directory() == Path("/somewhere/mine/xla")


def test_small_programs_are_kept_and_found_again(tmp_path: Path):
    folder, _ = run(JAXSERVE_CACHE_DIR=str(tmp_path))
    assert folder == str(tmp_path / "xla")
    written = entries(tmp_path)
    assert written
    run(JAXSERVE_CACHE_DIR=str(tmp_path))
    assert {p.name for p in entries(tmp_path)} == {p.name for p in written}


def test_off_keeps_nothing(tmp_path: Path):
    folder, _ = run(JAXSERVE_CACHE_DIR=str(tmp_path), JAXSERVE_COMPILE_CACHE="off")
    assert folder is None
    assert not entries(tmp_path)


def test_a_folder_given_to_jax_is_left_alone(tmp_path: Path):
    folder, _ = run(
        JAXSERVE_CACHE_DIR=str(tmp_path / "ours"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "its")
    )
    assert folder == str(tmp_path / "its")
    assert not (tmp_path / "ours").exists()


def test_an_unwritable_folder_costs_one_warning(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    folder, errors = run(JAXSERVE_CACHE_DIR=str(blocked))
    assert folder is None
    assert errors.count("cannot write compiled programs") == 1


def test_a_misspelt_switch_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXSERVE_COMPILE_CACHE", "of")
    with pytest.raises(UsageError, match="use on or off"):
        compile_cache.wanted()
