"""`jaxserve bench serve`: what it asks, prints, draws and refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxserve.benchmark.cli import app
from jaxserve.errors import JaxserveError, UsageError


def bench(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.fixture
def small() -> list[str]:
    return ["--requests", "3", "--scale", "0.05", "--quiet"]


def test_json_is_one_object_with_a_run_for_each_rate(fake_server, small):
    server = fake_server(first_s=0.01)
    slo = ["--slo-ttft", "90s", "--slo-tpot", "500ms"]
    ran = bench("--url", server.url, "--rate", "100,inf", "--seed", "3", *slo, *small, "--json")
    assert ran.exit_code == 0
    assert ran.stdout.count("\n") == 1
    fields = json.loads(ran.stdout)
    assert fields["server"] == server.url
    assert fields["interface"] == "completions"
    assert [run["rate"] for run in fields["rates"]] == [100.0, None]
    assert fields["slo"] == {"ttft_s": 90.0, "tpot_s": 0.5}
    assert fields["trace"]["seed"] == 3
    run = fields["rates"][0]
    assert (run["requests"], run["completed"], run["refused"], run["failed"]) == (3, 3, 0, 0)
    assert set(run["ttft_s"]) == {"mean", "p50", "p99"}


def test_without_json_a_table_is_printed(fake_server, small):
    ran = bench("--url", fake_server().url, "--rate", "50,100", *small)
    lines = ran.stdout.splitlines()
    assert "rate             50 a second" in lines
    assert "requests         3 of 3 done, 0 refused, 0 failed" in lines
    for name in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "client", "best goodput"):
        assert any(line.startswith(name) for line in lines)


def test_a_seed_is_drawn_for_each_run(fake_server, small):
    server = fake_server()
    seeds = {
        json.loads(bench("--url", server.url, *small, "--json").stdout)["trace"]["seed"]
        for _ in range(2)
    }
    assert len(seeds) == 2


def test_key_api_and_model_reach_the_server(fake_server, small, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("# of the server\nme secret\nyou other\n")
    server = fake_server()
    options = ["--api", "chat", "--model", "mine", "--api-key-file", str(key)]
    assert bench("--url", server.url, *options, *small).exit_code == 0
    assert {body["model"] for body in server.bodies} == {"mine"}
    assert all("authorization: bearer secret" in head for head in server.headers)
    assert all("messages" in body for body in server.bodies)


def test_context_and_vocabulary_bound_the_requests(fake_server, small):
    server = fake_server()
    bench("--url", server.url, "--context", "16", "--vocab-size", "9", *small)
    for body in server.bodies[1:]:
        assert len(body["prompt"]) + body["max_tokens"] <= 16
        assert max(body["prompt"]) < 9


def test_a_plot_shows_each_rate(fake_server, small, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "run.svg"
    ran = bench("--url", fake_server().url, "--rate", "50,100", *small, "--plot", str(path))
    assert ran.exit_code == 0
    text = path.read_text()
    for label in ("time to first token", "50/s", "100/s", "requests per second", "finished"):
        assert f"<!-- {label} -->" in text


def test_a_server_that_is_not_there_is_named(small):
    ran = bench("--url", "http://127.0.0.1:1", *small)
    assert isinstance(ran.exception, JaxserveError)
    assert "http://127.0.0.1:1 cannot be measured: GET /v1/models" in str(ran.exception)


def test_a_run_without_any_answer_fails_after_the_result(fake_server, small):
    ran = bench("--url", fake_server(status=503).url, *small, "--json")
    assert json.loads(ran.stdout)["rates"][0]["refused"] == 3
    assert isinstance(ran.exception, JaxserveError)
    assert "no request was answered" in str(ran.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one server"),
        (["--url", "http://a", "--grpc", "b:1"], "name one server"),
        (["--url", "http://a", "--api", "edits"], "--api edits"),
        (["--grpc", "a:1", "--api", "chat"], "go with --url"),
        (["--url", "http://a", "--rate", "fast"], "--rate 'fast'"),
        (["--url", "http://a", "--rate", "-1"], "rate=-1.0"),
        (["--url", "http://a", "--slo-ttft", "1 day"], "--slo-ttft '1 day'"),
        (["--url", "http://a", "--duration", "x"], "--duration 'x'"),
        (["--url", "http://a", "--api-key-file", "missing"], "--api-key-file missing"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    ran = bench(*arguments)
    assert isinstance(ran.exception, UsageError)
    assert message in str(ran.exception)
