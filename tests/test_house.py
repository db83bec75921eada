"""The rules of the house that no single module can break or keep alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

import jaxserve

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("configs", "layers", "pallas_kernels", "partitioning", "serving")

# Third parties that a package may reach, however indirectly.
ALLOWED = {
    # These run on a bare accelerator machine.
    "jaxserve.pallas_kernels": {"jax", "flax", "numpy"},
    "jaxserve.layers": {"jax", "flax", "numpy"},
    # Clients run where no model does.
    "jaxserve.client": {"google", "grpc"},
    # A pure state machine: microseconds to test, the same on every host.
    "jaxserve.serving.request": {"msgspec"},
    "jaxserve.serving.sequence": {"msgspec"},
    "jaxserve.serving.pages": {"msgspec"},
    "jaxserve.serving.plan": {"msgspec"},
    "jaxserve.serving.policy": {"msgspec"},
    "jaxserve.serving.prefix_cache": {"msgspec"},
    "jaxserve.serving.scheduler": {"msgspec"},
    "jaxserve.serving.shard_pages": {"msgspec"},
}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    built = grimp.build_graph("jaxserve", include_external_packages=True, cache_dir=None)
    # The public names: a package does not import what it offers lazily.
    for name in built.find_modules_directly_imported_by("jaxserve"):
        built.remove_import(importer="jaxserve", imported=name)
    return built


def tracked_files() -> list[Path]:
    """Returns the files under version control, links left out; none outside a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def modules_after(statement: str) -> set[str]:
    """Returns the modules that a fresh interpreter has loaded once it ran the statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_imports_go_only_downwards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    configure()
    assert lint_imports(config_filename="pyproject.toml", cache_dir=None)


@pytest.mark.parametrize("module", ALLOWED)
def test_third_parties_stay_within_bounds(graph: grimp.ImportGraph, module: str):
    if module not in graph.modules:
        pytest.skip(f"{module} does not exist yet")
    reached = graph.find_upstream_modules(module, as_package=True)
    third_parties = {
        name
        for name in reached
        if graph.is_module_squashed(name) and name not in sys.stdlib_module_names
    }
    assert third_parties <= ALLOWED[module]


def test_importing_jaxserve_loads_nothing_heavy():
    loaded = modules_after("import jaxserve; dir(jaxserve)")
    assert "jaxserve.errors" not in loaded
    assert not loaded & {"jax", "flax", "numpy", "msgspec"}


def test_the_messages_of_serving_load_no_array_library():
    loaded = modules_after("from jaxserve import Completion, SamplingParams, Usage")
    assert not loaded & {"jax", "flax", "numpy"}


def test_public_names_are_those_that_resolve():
    lazy = {name for names in jaxserve._HOMES.values() for name in names}
    assert set(jaxserve.__all__) == lazy | {"__version__"}
    assert dir(jaxserve) == sorted(jaxserve.__all__)


@pytest.mark.parametrize("name", jaxserve.__all__)
def test_public_name_resolves(name: str):
    assert getattr(jaxserve, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        jaxserve.lod  # noqa: B018


@pytest.mark.parametrize("name", LINKS)
def test_source_folders_are_relative_links(name: str):
    link = ROOT / "jaxserve" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.is_dir()


def test_the_tree_holds_nothing_unfinished_or_personal():
    marks = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK", "breakpoint" + "()"]
    homes = ["/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/", "C:" + r"\\Users"]
    wanted = re.compile(r"\b(" + "|".join(map(re.escape, marks)) + r")|" + "|".join(homes))
    texts = {".py", ".md", ".toml", ".ipynb", ".yaml", ".yml", ".sh", ".json", ""}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        if path.suffix in texts and "data" not in path.parts and "golden" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if wanted.search(line)
    ]
    assert not found
