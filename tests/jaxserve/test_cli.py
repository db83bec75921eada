"""The command line, as a user runs it."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import cli, load
from jaxserve.checkpoint.locate import locate
from jaxserve.models.family import family_for

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = ("llama-gqa-tied", "gemma2", "falcon-7b", "falcon-40b", "falcon-rw")
PALM: dict[str, Any] = {
    "architectures": ["PaLMForCausalLM"],
    "model_type": "palm",
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {"palm": PALM} | {
    case: json.loads((GOLDEN / case / "config.json").read_text()) for case in GOLDEN_CASES
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Returns a function that runs the command line in this process."""

    def call(*arguments: str, stdin: str | io.StringIO = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["jaxserve", *arguments])
        source = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", source)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


def random_checkpoint(folder: Path, case: str) -> Path:
    """Returns `folder` with a random checkpoint of a case's shape, and a tokenizer."""
    config = CONFIGS[case] | {"vocab_size": 2048}
    family = family_for(config)
    noise = np.random.default_rng(0)
    tensors = {
        source.tensor: noise.normal(0, 0.3, source.shape).astype(np.float32)
        for source in family.sources(family.config(config)).values()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("tiny") / name, folder)
    return folder


def test_greedy_json_is_the_same_bytes_twice_and_nothing_else_on_stdout() -> None:
    command = [sys.executable, "-m", "jaxserve", "generate", "def add(a, b):", "--json"]
    command += ["--max-tokens", "32", "--temperature", "0"]
    first, second = (subprocess.run(command, capture_output=True, check=True) for _ in range(2))
    assert first.stdout == second.stdout
    done = json.loads(first.stdout)
    assert set(done) == {"text", "token_ids", "finish_reason", "seed", "usage"}
    assert done["usage"]["completion_tokens"] <= 32
    assert done["usage"]["total_tokens"] == sum(
        done["usage"][kind] for kind in ("prompt_tokens", "completion_tokens")
    )


def test_the_streamed_text_is_that_of_the_json(run: Run) -> None:
    options = ("generate", "import ", "--max-tokens", "12", "--temperature", "0")
    streamed, as_json = run(*options), run(*options, "--json")
    assert streamed.code == as_json.code == 0
    assert streamed.out == json.loads(as_json.out)["text"] + "\n"
    assert "tokens/s" in streamed.err
    assert "tokens/s" not in as_json.err
    assert run(*options, "--quiet").err == ""


def test_a_prompt_can_be_piped(run: Run) -> None:
    options = ("--max-tokens", "6", "--temperature", "0", "--json")
    assert (
        run("generate", *options, stdin="import os").out
        == run("generate", "import os", *options).out
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "palm" else pytest.mark.slow) for case in CONFIGS],
)
def test_families_generate_from_a_directory(case: str, run: Run, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / case, case)
    options = ("--json", "--temperature", "0", "--max-tokens", "8")
    ran = run("generate", "--model", str(folder), *options, "x = 1")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["usage"]["completion_tokens"] == 8
    assert run("info", "--model", str(folder)).code == 0


def test_info_tells_sizes_by_hand(run: Run) -> None:
    facts = json.loads(run("info", "--json").out)
    # 2048 x 256 embeddings, and in each of 6 layers: q and out, k and v, three MLP weights, norms.
    layer = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 768 + 2 * 256
    parameters = 2048 * 256 + 6 * layer + 256
    assert facts["parameters"] == parameters
    assert facts["memory_bytes"]["bfloat16"] == 2 * parameters
    assert facts["cache_bytes_per_token"] == 6 * 2 * 2 * 32 * 2
    text = run("info").out
    assert f"{parameters:,}" in text
    assert "GQA 8/2 heads of 32" in text


def test_info_shows_both_cache_groups_of_alternating_windows(run: Run) -> None:
    facts = json.loads(run("info", "--json", "--model", str(GOLDEN / "gemma2")).out)
    assert {group["kind"] for group in facts["cache_groups"]} == {"window", "full"}


def test_info_of_a_truncated_checkpoint_fails_with_one_message(run: Run, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "cut", "palm")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = run("info", "--model", str(folder))
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert "model.safetensors" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_a_converted_checkpoint_generates_the_same(run: Run, tmp_path: Path) -> None:
    assert run("convert", "tiny", str(tmp_path / "orbax"), "--quiet").code == 0
    options = ("generate", "def f(", "--max-tokens", "8", "--temperature", "0", "--json")
    assert run(*options, "--model", str(tmp_path / "orbax")).out == run(*options).out
    again = run("convert", "tiny", str(tmp_path / "orbax"))
    assert again.code == 2
    assert str(tmp_path / "orbax") in again.err


def test_chat_carries_the_conversation_on(run: Run) -> None:
    ran = run("chat", "--max-tokens", "5", "--temperature", "0", "--quiet", stdin="hi\nwhat\n")
    assert ran.code == 0
    llm = load("tiny", show="silent")
    messages = [{"role": "user", "content": "hi"}]
    first = llm.chat(messages, max_tokens=5, temperature=0).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "what"}]
    second = llm.chat(messages, max_tokens=5, temperature=0).text
    assert ran.out == f"{first}\n{second}\n"


def test_chat_without_a_template_is_refused_before_the_first_line(run: Run, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "plain", "palm")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    del options["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    ran = run("chat", "--model", str(folder), "--quiet", stdin="hi\n")
    assert ran.code == 2
    assert "no chat template" in ran.err


def test_bytes_that_are_no_text_are_refused() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "jaxserve", "generate"],
        input=b"ok \xff",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert ran.returncode == 2
    assert b"not utf-8 at byte 3 (0xff)" in ran.stderr


def test_sampling_options_reach_the_sampler(run: Run) -> None:
    common = ("generate", "def f(", "--max-tokens", "12", "--json", "--quiet")
    greedy = run(*common, "--temperature", "0").out
    # One candidate leaves nothing to draw.
    for option in (("--top-k", "1"), ("--top-p", "0.0001"), ("--min-p", "1")):
        drawn = json.loads(run(*common, "--temperature", "1", "--seed", "4", *option).out)
        assert drawn["text"] == json.loads(greedy)["text"]
    seeded = run(*common, "--temperature", "1.5", "--seed", "4").out
    assert seeded == run(*common, "--temperature", "1.5", "--seed", "4").out
    assert seeded != run(*common, "--temperature", "1.5", "--seed", "5").out
    penalised = run(*common, "--temperature", "0", "--repetition-penalty", "5").out
    assert penalised != greedy


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "x", "--temperature", "3"), 2, "temperature=3.0 is out of range"),
        (("generate", "x", "--bogus"), 2, "No such option"),
        (("generate", "x", "--max-tokens", "9999"), 2, "context of 2048"),
        (("generate", "x", "--model", "nowhere"), 1, "'nowhere' is not a model"),
        (("generate", "x", "--dtype", "int3"), 2, "dtype='int3'"),
        (("generate", "x", "--logprobs", "2"), 2, "--logprobs 2 is shown only with --json"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_errors_are_one_message_without_traceback(
    arguments: tuple[str, ...], code: int, message: str, run: Run
) -> None:
    ran = run(*arguments)
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


class Terminal(io.StringIO):
    """Standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


def test_a_prompt_is_asked_for_at_a_terminal_and_may_not_be_empty(run: Run) -> None:
    for stdin, message in ((Terminal(), "no prompt"), (io.StringIO(), "the prompt is empty")):
        ran = run("generate", "--quiet", stdin=stdin)
        assert ran.code == 2
        assert message in ran.err


def test_help_and_version_import_no_jax() -> None:
    code = (
        "import sys; sys.argv = ['jaxserve', '--version']\n"
        "from jaxserve import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules, 'jax imported'"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("jaxserve 0.1")
