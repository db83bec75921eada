"""The planner's answers in Python and on the command line."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxserve import planner
from jaxserve.cli import app
from jaxserve.errors import ConfigError, JaxserveError, UnsupportedError, UsageError
from jaxserve.models.named import named_config
from jaxserve.partitioning.layout_file import read_layout
from jaxserve.partitioning.picture import LayoutView
from jaxserve.planner.compare import compared, read
from jaxserve.planner.manifest import benchmark_script, deployment
from jaxserve.planner.model import plan_config
from jaxserve.planner.show import merged

PALM = [
    "estimate", "palm-540b", "--slice", "v4:4x4x4", "--phase", "decode", "--batch", "64",
    "--context", "2048", "--weights", "int8", "--layout", "ws2d", "--attention", "batch",
]  # fmt: skip
SEARCH = ["llama-3-8b", "--slice", "v5e:2x2", "--isl", "1000", "--osl", "200", "--batch", "1:16"]


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.search(
        "llama-3-8b", "v5e:2x2", input_tokens=1000, output_tokens=200, batch=(1, 16), tpot_s=0.05
    )


def run(*args: str) -> str:
    done = CliRunner().invoke(app, list(args))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_an_estimate_is_one_object_with_its_terms_and_band():
    found = json.loads(run(*PALM, "--json"))
    assert found["time_s"] == pytest.approx(28.4e-3, rel=0.15)
    assert found["estimate"] is True and found["band"] == 0.15
    assert sum(term["seconds"] for term in found["terms"]) == pytest.approx(found["time_s"])
    assert {term["origin"] for term in found["terms"]} >= {"spec", "fitted", "assumed"}
    assert found["memory"]["free_bytes"] > 0


def test_the_longest_context_is_the_papers():
    asked = ("max-context", "palm-540b", "--slice", "v4:4x4x4", "--batch", "128")
    found = json.loads(run(*asked, "--attention", "batch", "--json"))
    assert found["max_context_tokens"] == pytest.approx(43_000, rel=0.02)


def test_a_model_after_plan_is_a_search():
    short, long = (
        json.loads(run("plan", *words, *SEARCH, "--json")) for words in ((), ("search",))
    )
    assert short == long
    assert short["verdict"] == "ok" and short["best"]


def test_the_table_says_that_it_estimates():
    text = run("plan", *SEARCH, "--explain")
    assert "estimates, within 40%" in text
    assert "prefill step" in text and "decode step" in text and "tokens/s └" in text


def test_what_does_not_fit_fails_with_the_bytes():
    with pytest.raises(JaxserveError, match=r"does not fit: at best .* GB short"):
        run("plan", "palm-540b", "--slice", "v5e:2x2", "--isl", "100", "--osl", "10")


def test_what_is_too_slow_fails_with_the_milliseconds():
    with pytest.raises(JaxserveError, match="ms too long; it fits, but not within these limits"):
        run("plan", *SEARCH, "--tpot", "1ms")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--slice", "v9:2x2"), UsageError, "chip 'v9' is not known; known: v4"),
        (("--slice", "v5e:3x3"), UsageError, "there is no slice v5e:3x3"),
        (("--tpot", "fast"), UsageError, "--tpot 'fast' is no time; give it as 800ms"),
        (("--tpot", "0ms"), UsageError, "tpot_s=0.0 must be positive"),
        (("--batch", "8:2"), UsageError, "batch 8:2 must be LEAST:MOST"),
        (("--batch", "many"), UsageError, "is not LEAST:MOST"),
        (("--weights", "int3"), UsageError, "weights='int3' is not known"),
        (("--attention", "rows"), UsageError, "attention='rows' is not known; use one of heads"),
        (("--isl", "9000"), UsageError, "the model's context is 8192"),
        (
            ("--expert", "2"),
            UnsupportedError,
            "expert=2 is not supported: the mesh has the axis in name alone",
        ),
        (("--pipeline", "0"), UsageError, "max_stages=0"),
    ],
)
def test_a_wrong_question_is_refused_with_the_remedy(
    words: tuple[str, ...], error: type[Exception], message: str
):
    with pytest.raises(error) as caught:
        run("plan", *SEARCH, *words)
    assert message in str(caught.value)


def test_a_config_is_all_that_is_needed(tmp_path: Path):
    fields = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert plan_config(path) == plan_config(tmp_path)
    del fields["hidden_size"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="hidden_size"):
        plan_config(path)
    path.write_text(json.dumps(fields | {"hidden_size": 256, "num_hidden_layers": 10**12}))
    with pytest.raises(ConfigError, match="num_hidden_layers=1000000000000 is more than 10000"):
        plan_config(path)
    path.write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedError, match="amba"):
        plan_config(path)
    with pytest.raises(UsageError, match="model 'nothing' is not known"):
        plan_config("nothing")
    with pytest.raises(UsageError, match=r"and none of mixtral-8x7b, or \d+ others"):
        plan_config("Mixtral")


def test_everything_is_saved(plan: planner.Plan, tmp_path: Path):
    names = {path.name for path in plan.save(tmp_path)}
    assert names == {
        "plan.json",
        "candidates.csv",
        "report.html",
        "report.png",
        "layout.json",
        "kubernetes.yaml",
        "benchmark.sh",
    }
    assert json.loads((tmp_path / "plan.json").read_text())["best"][0]["batch"] == plan.best.batch
    layout = read_layout(tmp_path / "layout.json")
    layout.check(named_config("llama-3-8b"), "bfloat16")
    assert layout.buckets is not None and layout.buckets.max_sequences == plan.best.batch
    rows = list(csv.DictReader(io.StringIO((tmp_path / "candidates.csv").read_text())))
    assert [row["set"] for row in rows].count("best") == len(plan.found.best)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h3>") == 2 and "data:image/png;base64," in page and "<svg" in page
    assert (tmp_path / "report.png").read_bytes()[1:4] == b"PNG"


def test_a_rounded_plan_is_served_with_its_options():
    small = planner.search(
        "llama-3-8b",
        "v5e:2x2",
        input_tokens=1000,
        output_tokens=200,
        batch=(1, 16),
        weights=("int8",),
        kv=("fp8",),
    )
    assert small.best.option.not_run() == []
    assert small.layout is not None
    assert {small.layout.dtypes.weights, small.layout.dtypes.kv} == {"bfloat16"}
    for text in deployment(small)["kubernetes.yaml"], benchmark_script(small):
        assert "--quantize=int8" in text and "--kv-dtype=fp8" in text


def test_answers_show_themselves(plan: planner.Plan):
    step = planner.estimate("llama-3-8b", "v5e:2x2", batch=4, context=100)
    room = planner.max_context("llama-3-8b", "v5e:2x2", batch=4)
    for answer, word in ((plan, "tokens/s"), (step, "estimate:"), (room, "tokens of 4 sequences")):
        assert word in str(answer)
        assert answer._repr_html_().startswith("<pre>")


def test_a_plan_without_an_answer_says_why(plan: planner.Plan):
    none = planner.search("palm-540b", "v5e:2x2", input_tokens=100, output_tokens=10)
    assert "does not fit" in str(none)
    with pytest.raises(UsageError, match="does not fit"):
        _ = none.best


def test_collectives_of_one_line_are_counted_together(plan: planner.Plan):
    terms = plan.steps["decode"].terms
    found = merged(terms)
    assert sum(term.count for term in found) == sum(term.count for term in terms) > len(found)
    assert sum(float(t.hops_s) for t in found) == pytest.approx(sum(t.hops_s for t in terms))
    for term in found:
        assert not term.count or f", {term.count} in all, hops " in term.remark


def test_a_map_of_chips_is_no_wider_than_its_page():
    made = planner.search(
        "llama-3-70b", "v4:4x4x4", input_tokens=500, output_tokens=100, max_replicas=1
    )
    width, places = 0.0, []
    assert made.layout is not None
    image = ET.fromstring(LayoutView(made.layout, made.found.config).svg())
    for part in image:
        if at := re.fullmatch(r"translate\((.+),(.+)\)", part.get("transform", "")):
            places.append((float(at[1]), float(at[2])))
            cells = [box for box in part if box.tag.endswith("rect")]
            right = max(float(box.get("x", 0)) + float(box.get("width", 0)) for box in cells)
            width = max(width, float(at[1]) + right)
    assert len(places) == len(set(places)) == 5
    assert width < float(image.get("width", 0)) <= 1180


def test_every_answer_states_its_band(tmp_path: Path):
    slow = planner.search(
        "llama-3-8b", "v5e:2x2", input_tokens=100, output_tokens=10, tpot_s=1e-6, batch=(1, 2)
    )
    none = planner.search("palm-540b", "v5e:2x2", input_tokens=100, output_tokens=10)
    for plan in (slow, none):
        assert plan.fields()["band"] == 0.4
        assert "within 40%" in str(plan)
    words = ["llama-3-8b", "--isl", "100", "--osl", "10", "--batch", "1:4", "--max-chips", "4"]
    size = ("plan", "size", *words, "--rate", "1", "--chip", "v4,v6e")
    assert [one["band"] for one in json.loads(run(*size, "--json"))["slices"]] == [0.2, 0.15]
    assert "± 20%" in run(*size) and "± 15%" in run(*size)
    room = planner.max_context("palm-540b", "v4:4x4x4", batch=128)
    assert room.fields()["band"] == 0.0 and "exact" in str(room)
    step = planner.estimate("llama-3-8b", "v4:2x2x1")
    assert "± 15%" in str(step)
    found = compared(step.fields(), step.fields(), ("a", "b"))
    assert ("band, share of a time", "", 0.15, 0.15) in found.rows


def test_two_estimates_are_compared_term_by_term(tmp_path: Path):
    for name, weights in (("a", "bfloat16"), ("b", "int8")):
        found = planner.estimate("palm-540b", "v4:4x4x4", batch=64, weights=weights, mesh="4,4,4")
        (tmp_path / f"{name}.json").write_text(json.dumps(found.fields()))
    found = json.loads(
        run("plan", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json")
    )
    rows = {row["name"]: (row["first"], row["second"]) for row in found["rows"]}
    first, second = rows["MLP out (weights)"]
    assert second / first == pytest.approx(0.5, rel=0.01)
    assert rows["attention (compute)"][0] == rows["attention (compute)"][1]


def test_what_is_no_plan_is_not_compared(plan: planner.Plan, tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match="is no plan and no estimate"):
        read(path)
    step = planner.estimate("llama-3-8b", "v5e:2x2").fields()
    with pytest.raises(UsageError, match="compare two of a kind"):
        compared(plan.fields(), step, ("a", "b"))


def test_the_cheapest_slice_comes_first():
    plans = planner.size(
        "llama-3-8b",
        rate=3.0,
        input_tokens=500,
        output_tokens=100,
        chip=["v5e", "v6e"],
        max_chips=8,
        batch=(1, 16),
    )
    prices = [plan.found.on.usd_hour or 0 for plan in plans]
    assert prices == sorted(prices)
    assert all(plan.best.requests_per_s * 0.9 >= 3.0 for plan in plans)
    # Of both chips the faster one misses by less.
    with pytest.raises(UsageError, match=r"carries 3.0 requests/s; nearest is v5p:2x2x2: too"):
        planner.size(
            "llama-3-8b", rate=3.0, input_tokens=500, output_tokens=100, chip=["v5p", "v5e"],
            max_chips=8, tpot_s=1e-4,
        )  # fmt: skip
    with pytest.raises(UsageError, match="no slice of up to 1 chips carries 1000"):
        planner.size(
            "llama-3-8b", rate=1000.0, input_tokens=500, output_tokens=100, chip="v6e", max_chips=1
        )


def test_hardware_is_listed_with_its_sources():
    assert json.loads(run("plan", "hardware", "list", "--json")).keys() >= {"v4", "h100", "l4"}
    text = run("plan", "hardware", "show", "v4")
    assert "Pope et al. 2022" in text and "bytes/s one way" in text


def test_plans_of_one_name_are_told_apart(plan: planner.Plan, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(json.dumps(plan.fields()))
    files = [str(tmp_path / name / "plan.json") for name in ("a", "b")]
    found = json.loads(run("plan", "compare", *files, "--json"))
    assert found["names"] == files
