"""`jaxserve bench throughput`, without a model; what it prints and what it hands on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Ran

from jaxserve.benchmark import cli, run
from jaxserve.benchmark.metrics import Slo
from jaxserve.benchmark.report import Result
from jaxserve.benchmark.run import Job
from jaxserve.errors import JaxserveError, UsageError


@pytest.fixture
def bench(result: Result, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Ran, list[Job]]]:
    """Returns a function from arguments to what the command did and the jobs it ran."""

    def call(*arguments: str) -> tuple[Ran, list[Job]]:
        jobs: list[Job] = []

        def measure(job: Job) -> Result:
            jobs.append(job)
            return result

        monkeypatch.setattr(run, "measure", measure)
        return CliRunner().invoke(cli.app, ["throughput", *arguments]), jobs

    return call


def test_json_is_one_object_and_nothing_else(bench):
    ran, _ = bench("--json")
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["output_tokens_per_s"] == 2.0
    assert ran.stdout.count("\n") == 1


def test_without_json_a_table_is_printed(bench):
    ran, _ = bench()
    assert "output tokens/s  2.0" in ran.stdout


def test_every_option_reaches_the_run(bench):
    arguments = (
        "--model m --dtype float32 --requests 7 --rate 2.5 --seed 4 --scale 0.5 --slo-ttft 1 "
        "--slo-tpot 0.1 --max-sequences 8 --max-step-tokens 64 --page-size 32 --quiet "
        "--mesh 2,2,2 --layout ws2d --prefill-layout wg-x --attention batch --devices cpu:8"
    )
    _, (job,) = bench(*arguments.split())
    assert job == Job(
        model="m",
        dtype="float32",
        requests=7,
        rate=2.5,
        seed=4,
        scale=0.5,
        slo=Slo(1.0, 0.1),
        engine={"max_sequences": 8, "max_step_tokens": 64, "page_size": 32},
        sharding={
            "mesh": "2,2,2",
            "layout": "ws2d",
            "prefill_layout": "wg-x",
            "attention": "batch",
            "devices": "cpu:8",
        },
        quiet=True,
    )


def test_what_is_left_out_takes_the_defaults_of_a_job(bench):
    _, (job,) = bench()
    assert job == Job()


def test_a_plot_is_written(bench, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ran, _ = bench("--plot", str(tmp_path / "run.png"))
    assert ran.exit_code == 0
    assert (tmp_path / "run.png").exists()


def test_a_plot_that_cannot_be_written_is_refused_before_the_run(bench, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ran, jobs = bench("--plot", str(tmp_path / "missing" / "run.png"))
    assert isinstance(ran.exception, UsageError)
    assert jobs == []


def test_failed_requests_fail_the_command_after_the_result(bench, result: Result):
    result.records[0].error = "no memory"
    ran, _ = bench("--json")
    assert json.loads(ran.stdout)["failed_requests"] == 1
    assert isinstance(ran.exception, JaxserveError)
    assert "1 of 2 requests failed, the first with: no memory" in str(ran.exception)
