"""The search of `.ci/environment` for a Python that works, among pretended ones."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "environment"

# A Python that tells its version, makes environments like itself, and installs or does not.
FAKE = """#!/bin/sh
case "$*" in
    "-m venv "*) {venv} && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "$*" >>"{log}"; {install} ;;
    --version) echo "Python {version}" ;;
    "- "*) echo "{sort_key} $0" ;;
esac
"""


class Machine:
    """A folder of pretended Pythons as pyenv lays them out, and a place for environments."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "installed"
        self.target = folder / "venv"

    def add(self, version: str, *, venv: bool = True, install: bool = True) -> None:
        path = self.folder / "pyenv" / "versions" / version / "bin" / "python3"
        path.parent.mkdir(parents=True)
        path.write_text(
            FAKE.format(
                version=version,
                sort_key=".".join(f"{int(part):04d}" for part in version.split(".")),
                log=self.log,
                venv=str(venv).lower(),
                install=str(install).lower(),
            )
        )
        path.chmod(0o755)

    def run(self, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, self.target, "thing"],
            env={"PATH": "/usr/bin:/bin", "PYENV_ROOT": str(self.folder / "pyenv")} | settings,
            capture_output=True,
            text=True,
        )

    def chosen(self) -> str:
        python = self.target / "bin" / "python"
        return subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_is_taken(machine: Machine):
    machine.add("3.12.9")
    machine.add("3.99.10")
    machine.add("3.99.9")
    assert machine.run().returncode == 0
    assert machine.chosen() == "Python 3.99.10"


def test_pythons_that_do_not_work_are_passed_over(machine: Machine):
    machine.add("3.99.3", venv=False)
    machine.add("3.99.2", install=False)
    machine.add("3.99.1")
    done = machine.run()
    assert done.returncode == 0
    assert machine.chosen() == "Python 3.99.1"
    assert "3.99.3/bin/python3 cannot make an environment" in done.stderr
    assert "3.99.2/bin/python3 cannot install thing" in done.stderr


def test_an_environment_that_stands_is_kept(machine: Machine):
    machine.add("3.99.1")
    machine.run()
    machine.add("3.99.2")
    assert machine.run().returncode == 0
    assert machine.chosen() == "Python 3.99.1"
    assert len(machine.log.read_text().splitlines()) == 2


def test_one_version_alone_can_be_asked_for(machine: Machine):
    machine.add("3.98.5")
    machine.add("3.99.1")
    assert machine.run(ONLY="3.98").returncode == 0
    assert machine.chosen() == "Python 3.98.5"


def test_a_missing_version_has_its_own_status(machine: Machine):
    machine.add("3.99.1")
    assert machine.run(ONLY="3.98").returncode == 3
    assert not machine.target.exists()


def test_a_failed_installation_is_not_taken_for_a_missing_version(machine: Machine):
    machine.add("3.98.5", install=False)
    assert machine.run(ONLY="3.98").returncode == 1
    assert not machine.target.exists()
