"""Measures the seconds from the start of the process to the first token, cold and warm.

    python benchmarks/startup.py                  # --json prints one JSON object instead

Cold is an empty compilation cache, warm is the one that the cold start filled. Every start is a
process of its own: `jaxserve generate` on the embedded model, streaming.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402  (the repository's root comes first)

COMMAND = ("-m", "jaxserve", "generate", "def add(a, b):", "--max-tokens", "16", "--quiet")


def main() -> None:
    """Runs the starts and prints the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cold, warm = [], []
    first_token_s(tempfile.mkdtemp())  # byte code and the page cache are not what is measured
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_token_s(cache))
            warm.append(first_token_s(cache))
    result = {
        "benchmark": "startup",
        **machine.facts(),
        "command": "jaxserve generate (tiny, bfloat16)",
        "cold_s": {"median": round(statistics.median(cold), 2), "all": [round(t, 2) for t in cold]},
        "warm_s": {"median": round(statistics.median(warm), 2), "all": [round(t, 2) for t in warm]},
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        print(f"{result['date']}, {result['device']}")
        print(
            f"first token: {statistics.median(cold):.2f} s cold, "
            f"{statistics.median(warm):.2f} s warm"
        )


def first_token_s(cache: str) -> float:
    """Returns the seconds until the first text arrives from a fresh process."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *COMMAND],
        env={**os.environ, "JAXSERVE_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"jaxserve generate failed with status {process.returncode}")
    return took


if __name__ == "__main__":
    main()
