"""Completes a prompt from the command line.

python -m jaxserve.client "def f(" --target localhost:8001 --max-tokens 32
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jaxserve.client.blocking import Client
from jaxserve.client.connection import Tls
from jaxserve.client.requests import Sampling
from jaxserve.errors import JaxserveError

KEY_VARIABLE = "JAXSERVE_API_KEY"


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m jaxserve.client",
        description="Completes a prompt by a jaxserve server, and prints the text as it comes.",
        epilog=f"The API key is read from {KEY_VARIABLE}.",
    )
    made.add_argument("prompt", nargs="?", help="without it, standard input")
    made.add_argument("--target", default="localhost:8001", help="host:port (%(default)s)")
    made.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    made.add_argument("--max-tokens", type=int, help="longest completion")
    made.add_argument("--temperature", type=float, help="0 is greedy")
    made.add_argument("--top-k", type=int)
    made.add_argument("--top-p", type=float)
    made.add_argument("--min-p", type=float)
    made.add_argument("--seed", type=int)
    made.add_argument("--stop", action="append", help="a string that ends it; may be repeated")
    made.add_argument("--timeout", type=float, help="seconds")
    made.add_argument("--tls", action="store_true", help="encrypt, with the usual certificates")
    made.add_argument("--ca", type=Path, help="certificates that the server's is signed by")
    made.add_argument("--cert", type=Path, help="the client's own certificate")
    made.add_argument("--key", type=Path, help="the key of --cert")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (failed) or 2 (bad usage)."""
    asked = parser().parse_args(arguments)
    prompt = sys.stdin.read() if asked.prompt is None else asked.prompt
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    sampling = Sampling(
        **{name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    )
    files = (asked.ca, asked.cert, asked.key)
    try:
        with Client(
            asked.target,
            api_key=os.environ.get(KEY_VARIABLE),
            tls=Tls(*files) if any(files) else asked.tls,
            timeout_s=asked.timeout,
        ) as client:
            chat = [{"role": "user", "content": prompt}]
            for chunk in client.stream(chat if asked.chat else prompt, **sampling):
                print(chunk.text, end="", flush=True)
        print()
    except (JaxserveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, JaxserveError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
