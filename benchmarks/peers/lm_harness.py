"""Runs lm-evaluation-harness against a server of the OpenAI interface, in the harness's own Python.

python -m benchmarks.peers.lm_harness URL MODEL TOKENIZER_DIR ITEMS.jsonl

Prints one JSON object: the harness's version, its scores, and the log-likelihood that it found for
each choice of each item. An item has a prompt, choices and the number of the right one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

TASK = """\
task: completion
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def main(url: str, model: str, tokenizer: str, items: str) -> None:
    """Scores the items and prints what the harness found."""
    with redirect_stdout(sys.stderr):
        answer = evaluate(url, model, tokenizer, items)
    print(json.dumps(answer))


def evaluate(url: str, model: str, tokenizer: str, items: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "completion.yaml").write_text(TASK.format(items=Path(items).resolve()))
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": model,
                "base_url": f"{url}/v1/completions",
                "tokenizer": tokenizer,
                "num_concurrent": 8,
                "max_length": 2048,
            },
            tasks=["completion"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = sorted(results["samples"]["completion"], key=lambda sample: sample["doc_id"])
    scores = results["results"]["completion"]
    return {
        "version": version("lm_eval"),
        "scores": {name: scores[f"{name},none"] for name in ("acc", "acc_norm")},
        "log_likelihoods": [[float(one[0]) for one in s["filtered_resps"]] for s in samples],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
