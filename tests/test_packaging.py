"""What an installed jaxserve contains: all that the links show in the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def sources() -> set[str]:
    """Returns the files of the package as seen through its links."""
    return {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "jaxserve", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }


def build(kind: str, source: Path, output: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(output)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = output.iterdir()
    return built


def packaged(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("jaxserve/")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an unpacked source distribution."""
    packed = build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(packed) as archive:
        archive.extractall(unpacked, filter="data")
    (top,) = unpacked.iterdir()
    return top


def test_a_wheel_holds_every_source_and_data_file(tmp_path: Path):
    assert packaged(build("wheel", ROOT, tmp_path)) == sources()


def test_a_wheel_from_the_source_distribution_holds_the_same(sdist: Path, tmp_path: Path):
    assert packaged(build("wheel", sdist, tmp_path)) == sources()


@pytest.mark.parametrize(
    "path",
    [
        "jaxserve/layers/__init__.py",
        "jaxserve/data/tiny/model.safetensors",
        "jaxserve/data/tiny/README.md",
        "jaxserve/data/tiny-draft/model.safetensors",
    ],
)
def test_the_package_has(path: str):
    assert path in sources()


def test_the_package_has_named_configs():
    assert any(path.startswith("jaxserve/configs/") for path in sources())
