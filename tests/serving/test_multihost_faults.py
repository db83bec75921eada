"""Groups of processes over fake engines: what happens when one is lost, silent or wrong."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")


WAIT_S = 60.0
NOTICED_S = 15.0
TURN_S = 0.02
SECRET = "the secret of this group"

CODE = """
import asyncio, json, sys
from jaxserve.serving import logs
from jaxserve.serving.fake_service import COMMAND, fake_start, remote_fake
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.multihost.member import Member
from jaxserve.serving.server import Server
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.supervisor import Backoff

group, fields = json.loads(sys.argv[1]), json.loads(sys.argv[2])
group = Group(**{**group, "secret": group["secret"].encode()})
logs.set_up(as_json=True)

async def main():
    backoff = Backoff(first_s=0.05)
    if not group.leads:
        start = fake_start(group, **fields)
        return await Member(start, 0, drain_s=5.0, command=COMMAND, backoff=backoff).run()
    service = remote_fake(backoff, group, **fields)
    options = ServerOptions(model_name="fake", http_port=0, grpc_port=None)
    return await Server(service, options).run()

sys.exit(asyncio.run(main()))
"""


def free_port() -> int:
    """Returns a port that is free together with the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


class Rank:
    """The process of one rank, and the engine process under it."""

    def __init__(self, group: dict[str, Any], fields: dict[str, Any]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - nobody reads a pipe meanwhile
        self.out = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(group), json.dumps(fields)],
            stdout=self.out,
            stderr=self.log,
            text=True,
        )

    @property
    def engine_pid(self) -> int:
        """Returns the number of the engine's process."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        children = Path(path).read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def said(self, word: str) -> bool:
        """Returns whether the log has a word."""
        return word in self.text()

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def announced(self) -> str:
        """Returns the line that says it is ready, or nothing."""
        self.out.seek(0)
        return self.out.readline()


class Ranks:
    """All processes of a group."""

    def __init__(
        self,
        size: int,
        changes: dict[int, dict[str, Any]],
        port: int | None = None,
        **fields: Any,
    ) -> None:
        self.port = port or free_port()
        self.size, self.fields = size, fields
        self.ranks = [self.launch(rank, **changes.get(rank, {})) for rank in range(size)]

    def launch(self, rank: int, **changes: Any) -> Rank:
        group = {
            "coordinator": f"127.0.0.1:{self.port}",
            "num_processes": self.size,
            "process_id": rank,
            "secret": SECRET,
            "silence_s": 1.5,
            "stall_s": 30.0,
            "join_s": 20.0,
        }
        group |= {name: changes.pop(name) for name in list(changes) if name in group}
        return Rank(group, self.fields | changes)

    @property
    def http(self) -> int:
        """Returns the port of rank 0's HTTP server."""
        return int(self.ranks[0].announced().split("http://127.0.0.1:")[1].split()[0])

    def wait_ready(self) -> None:
        wait(lambda: all(rank.announced() for rank in self.ranks))

    def end(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(AssertionError, OSError):
                os.kill(rank.engine_pid, signal.SIGKILL)
            rank.process.kill()
            rank.process.wait()
            sys.stderr.write(rank.text()[-3000:])
            rank.log.close()
            rank.out.close()


@contextlib.contextmanager
def group(
    size: int = 2, changes: dict[int, dict[str, Any]] | None = None, **fields: Any
) -> Iterator[Ranks]:
    """Yields the processes of a group, which may not be ready yet."""
    ranks = Ranks(size, changes or {}, **fields)
    try:
        yield ranks
    finally:
        ranks.end()


def wait(true: Callable[[], Any], wait_s: float = WAIT_S) -> float:
    """Returns the seconds until something is true, counted by turns: a machine may be paused."""
    turns = 0
    while not true():
        assert turns * TURN_S < wait_s, "it never came true"
        time.sleep(TURN_S)
        turns += 1
    return turns * TURN_S


async def call(
    port: int, path: str, body: dict[str, Any] | None = None
) -> tuple[int, dict[str, str], str]:
    """Returns status, headers and body of a request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: localhost\r\n"
        head += f"connection: close\r\ncontent-length: {len(data)}\r\n"
        head += "content-type: application/json\r\n\r\n"
        writer.write(head.encode() + data)
        answer = (await asyncio.wait_for(reader.read(), WAIT_S)).decode()
        top, _, rest = answer.partition("\r\n\r\n")
        first, *lines = top.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]), headers, rest
    finally:
        writer.close()


async def complete(port: int, max_tokens: int, **fields: Any) -> tuple[int, dict[str, str], str]:
    asked = {"model": "fake", "prompt": [97, 98, 99], "max_tokens": max_tokens}
    asked |= {"temperature": 0, "ignore_eos": True}
    return await call(port, "/v1/completions", asked | fields)


def usage(body: str) -> int:
    return json.loads(body)["usage"]["completion_tokens"]


def text_of(body: str) -> str:
    return json.loads(body)["choices"][0]["text"]


async def running_is(port: int, number: int) -> None:
    """Waits until so many sequences run."""
    until = time.monotonic() + WAIT_S
    while True:
        _, _, page = await call(port, "/metrics")
        (line,) = [x for x in page.splitlines() if x.startswith("jaxserve_num_requests_running{")]
        if float(line.split()[-1]) == number:
            return
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


async def ready_again(port: int) -> None:
    until, status = time.monotonic() + WAIT_S, 503
    while status != 200:
        assert time.monotonic() < until
        status, _, _ = await call(port, "/health/ready")
        await asyncio.sleep(0.05)


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 2 * WAIT_S)

    return asyncio.run(bounded())


SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
def test_a_killed_rank_is_named_fails_what_runs_and_comes_back(size: int) -> None:
    async def work(ranks: Ranks) -> None:
        port, last = ranks.http, ranks.ranks[-1]
        before = [rank.engine_pid for rank in ranks.ranks]
        whole = await complete(port, 24)
        assert usage(whole[2]) == 24
        tasks = [asyncio.create_task(complete(port, 400)) for _ in range(3)]
        await running_is(port, 3)
        os.kill(last.engine_pid, signal.SIGKILL)
        began = time.monotonic()
        for status, headers, body in await asyncio.gather(*tasks):
            assert status == 503
            assert headers["x-request-id"]
            assert json.loads(body)["error"]["code"] == "unavailable"
            assert f"rank {size - 1} closed its connection" in body
        assert time.monotonic() - began < NOTICED_S
        await ready_again(port)
        assert text_of((await complete(port, 24))[2]) == text_of(whole[2])
        after = [rank.engine_pid for rank in ranks.ranks]
        assert not set(before) & set(after), "the whole group begins anew"
        lost = f"the group is lost: rank {size - 1} closed its connection"
        assert all(rank.said(lost) for rank in ranks.ranks[:-1])

    with group(size, step_s=0.02) as ranks:
        ranks.wait_ready()
        run(work(ranks))


@pytest.mark.parametrize("size", SIZES)
def test_a_silent_rank_is_named_within_the_deadline(size: int) -> None:
    async def work(ranks: Ranks) -> None:
        port, last = ranks.http, ranks.ranks[-1]
        task = asyncio.create_task(complete(port, 500))
        await running_is(port, 1)
        stopped = last.engine_pid
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        status, _, body = await task
        assert status == 503
        assert f"rank {size - 1} gave no sign of life for 1.5 s" in body
        assert time.monotonic() - began < NOTICED_S
        await ready_again(port)  # its own server has replaced it
        assert last.engine_pid != stopped

    with group(size, step_s=0.05) as ranks:
        ranks.wait_ready()
        run(work(ranks))


@pytest.mark.slow
def test_a_stopped_rank_0_is_noticed_by_the_others() -> None:
    with group(2) as ranks:
        ranks.wait_ready()
        os.kill(ranks.ranks[0].engine_pid, signal.SIGSTOP)
        noticed_s = wait(lambda: ranks.ranks[1].said("rank 0 gave no sign of life for 1.5 s"))
        assert noticed_s < NOTICED_S
        run(ready_again(ranks.http))


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_holds_up_a_step_of_all_is_named(size: int) -> None:
    changes = {rank: {"wait_id": 200} for rank in range(size - 1)} | {size - 1: {"hang_id": 200}}
    with group(size, changes) as ranks:
        ranks.wait_ready()
        status, _, body = run(complete(ranks.http, 8, prompt=[200]))
        assert status == 503
        assert "plan " in body and f"5 s: rank {size - 1} has not begun it" in body
        assert all(rank.said(f"rank {size - 1} has not begun it") for rank in ranks.ranks[:-1])
        run(ready_again(ranks.http))


@pytest.mark.slow
def test_a_step_that_hangs_on_all_ranks_blames_none_of_them() -> None:
    with group(4, {rank: {"wait_id": 200} for rank in range(4)}) as ranks:
        ranks.wait_ready()
        status, _, body = run(complete(ranks.http, 8, prompt=[200]))
        assert status == 503
        assert "all ranks wait in it" in body


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_is_stopped_in_a_step_of_all_is_named(size: int) -> None:
    async def work(ranks: Ranks) -> None:
        port, last = ranks.http, ranks.ranks[-1]
        task = asyncio.create_task(complete(port, 8, prompt=[200]))
        await running_is(port, 1)
        last.process.send_signal(signal.SIGSTOP)  # who would end it
        stopped = last.engine_pid
        os.kill(stopped, signal.SIGSTOP)
        status, _, body = await task
        assert status == 503
        assert f"5 s: rank {size - 1} has given no sign of life for" in body
        last.process.send_signal(signal.SIGCONT)
        await ready_again(port)
        assert last.engine_pid != stopped

    changes = {rank: {"wait_id": 200, "silence_s": 30.0} for rank in range(size)}
    with group(size, changes) as ranks:
        ranks.wait_ready()
        run(work(ranks))


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named() -> None:
    changes = {1: {"hang_id": 200}, 0: {"stall_s": 1.0}}
    with group(2, changes) as ranks:
        ranks.wait_ready()
        status, _, body = run(complete(ranks.http, 500, prompt=[200]))
        assert ranks.ranks[0].said("rank 1 has been at one step for") or status == 200, body
        wait(lambda: ranks.ranks[0].said("rank 1 has been at one step for"), NOTICED_S)
        run(ready_again(ranks.http))


@pytest.mark.slow
def test_a_rank_that_computes_other_tokens_is_named() -> None:
    with group(2, {1: {"vocab_size": 131}}, step_s=0.02) as ranks:
        ranks.wait_ready()
        run(complete(ranks.http, 300))
        wait(lambda: ranks.ranks[0].said("rank 1 computed other tokens"), NOTICED_S)


@pytest.mark.parametrize(
    ("size", "field", "said"),
    [
        (2, "layout", "another layout or other sizes (xy) than rank 0 (ab)"),
        pytest.param(4, "layout", "another layout or other sizes (xy)", marks=pytest.mark.slow),
        pytest.param(2, "model", "another model (xy) than rank 0 (cd)", marks=pytest.mark.slow),
        pytest.param(4, "jaxserve", "another version of jaxserve (xy)", marks=pytest.mark.slow),
    ],
    ids=["2-layout", "4-layout", "2-model", "4-version"],
)
def test_a_rank_of_another_kind_ends_all_processes(size: int, field: str, said: str) -> None:
    with group(size, {size - 1: {"identity": {field: "xy"}}}) as ranks:
        for rank in ranks.ranks:
            assert rank.process.wait(WAIT_S) != 0
            assert rank.said(f"rank {size - 1} has {said}")


def test_a_rank_lost_at_the_first_start_is_named_and_ends_all_processes() -> None:
    with group(2, load_s=30.0) as ranks:
        wait(lambda: ranks.ranks[0].said("all 2 ranks are there"))
        os.kill(ranks.ranks[1].engine_pid, signal.SIGKILL)
        for rank in ranks.ranks:
            assert rank.process.wait(WAIT_S) != 0
        said = "the engine ended while it started: rank 1 closed its connection"
        assert ranks.ranks[0].said(said)
        assert ranks.ranks[1].said("the rank is lost: it was ended by SIGKILL")


@pytest.mark.slow
def test_missing_ranks_are_named_while_they_are_waited_for() -> None:
    with group(4, {rank: {"join_s": 4.0} for rank in range(4)}) as ranks:
        for rank in (1, 3):
            ranks.ranks[rank].process.kill()
            with contextlib.suppress(AssertionError, OSError):
                os.kill(ranks.ranks[rank].engine_pid, signal.SIGKILL)
        wait(lambda: ranks.ranks[0].said("waits for ranks 1 and 3 of 4"))
        for rank in (0, 2):
            assert ranks.ranks[rank].process.wait(WAIT_S) != 0
            assert ranks.ranks[rank].said("ranks 1 and 3 of 4 did not come within 4 s")


class Proxy:
    """Hands on what goes between rank 0 and another rank, until it drops or changes it."""

    def __init__(self, target: int) -> None:
        while True:  # rank 0's port is the one after the coordinator's
            try:
                self.listener = socket.create_server(("127.0.0.1", free_port() + 1))
                break
            except OSError:
                continue
        self.port, self.target = self.listener.getsockname()[1], target
        self.pairs: list[socket.socket] = []
        self.changes = threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.listener.accept()
                try:
                    two = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    one.close()
                    continue
                self.pairs += [one, two]
                for source, sink in ((one, two), (two, one)):
                    work = (source, sink, self.changes)
                    threading.Thread(target=pump, args=work, daemon=True).start()

    def drop(self) -> None:
        for sock in self.pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.pairs.clear()


def pump(source: socket.socket, sink: socket.socket, changes: threading.Event) -> None:
    """Hands on; where it is to change something, the end of the next plan."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if changes.is_set() and data.rfind(b"Plan") > data.rfind(b"Pulse"):
                changes.clear()
                data = data[:-1] + bytes([data[-1] ^ 1])
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("size", SIZES)
def test_a_dropped_connection_is_noticed_on_both_sides(size: int) -> None:
    async def work(ranks: Ranks) -> None:
        task = asyncio.create_task(complete(ranks.http, 500))
        await running_is(ranks.http, 1)
        proxy.drop()
        status, _, body = await task
        assert status == 503
        assert f"rank {size - 1}" in body and "connection" in body
        await ready_again(ranks.http)

    with group_with_proxy(size) as (ranks, proxy):
        run(work(ranks))
        assert ranks.ranks[-1].said("the group is lost: rank 0")


@contextlib.contextmanager
def group_with_proxy(size: int) -> Iterator[tuple[Ranks, Proxy]]:
    """Yields a group that is ready, and what lies between rank 0 and the last rank."""
    port = free_port()
    proxy = Proxy(port + 1)
    changes = {size - 1: {"coordinator": f"127.0.0.1:{proxy.port - 1}"}}
    ranks = Ranks(size, changes, port, step_s=0.05)
    try:
        ranks.wait_ready()
        yield ranks, proxy
    finally:
        ranks.end()
        proxy.listener.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_plan_that_was_changed_on_its_way_is_not_run(size: int) -> None:
    async def work(ranks: Ranks) -> None:
        task = asyncio.create_task(complete(ranks.http, 500))
        await running_is(ranks.http, 1)
        proxy.changes.set()
        status, _, body = await task
        assert status == 503
        assert f"rank {size - 1} broke off: a step failed (what came after plan" in body
        assert "was not sent by rank 0 of this group" in body
        await ready_again(ranks.http)

    with group_with_proxy(size) as (ranks, proxy):
        run(work(ranks))


def test_a_group_that_is_asked_to_end_while_it_is_lost_says_that_it_failed() -> None:
    # Rank 1 never comes back, so the group cannot.
    with group(2) as ranks:
        ranks.wait_ready()
        one = ranks.ranks[1]
        one.process.send_signal(signal.SIGSTOP)
        os.kill(one.engine_pid, signal.SIGKILL)
        wait(lambda: ranks.ranks[0].said("the engine starts again in"))
        for rank in ranks.ranks:
            rank.process.send_signal(signal.SIGTERM)
        one.process.send_signal(signal.SIGCONT)
        assert [rank.process.wait(WAIT_S) for rank in ranks.ranks] == [1, 1]


@pytest.mark.slow
def test_a_rank_that_is_lost_while_it_drains_says_that_it_failed() -> None:
    with group(2, step_s=0.02) as ranks:
        ranks.wait_ready()
        one = ranks.ranks[1]
        one.process.send_signal(signal.SIGTERM)
        wait(lambda: one.said("waits for rank 0 to end the group"))
        os.kill(one.engine_pid, signal.SIGKILL)
        assert one.process.wait(WAIT_S) == 1


async def check_health(rank: Rank) -> None:
    """Checks that a rank above 0 tells its health, and nothing else."""
    line = rank.announced()
    assert "rank 1 of 2 follows" in line
    port = int(line.split("health http://127.0.0.1:")[1])
    for path in ("/health", "/health/ready"):
        status, _, body = await call(port, path)
        assert (status, json.loads(body)["status"]) == (200, "ok")
    for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": "a"})):
        status, _, _ = await call(port, path, body)
        assert status == 404


def test_a_group_tells_health_drains_and_ends_well() -> None:
    async def work(ranks: Ranks) -> None:
        await check_health(ranks.ranks[1])
        tasks = [asyncio.create_task(complete(ranks.http, 60)) for _ in range(3)]
        await running_is(ranks.http, 3)
        for rank in reversed(ranks.ranks):  # as Kubernetes does: all at once
            rank.process.send_signal(signal.SIGTERM)
        for status, _, body in await asyncio.gather(*tasks):
            assert status == 200
            assert usage(body) == 60

    with group(2, step_s=0.02) as ranks:
        ranks.wait_ready()
        run(work(ranks))
        for rank in ranks.ranks:
            assert rank.process.wait(WAIT_S) == 0
        assert not ranks.ranks[0].said("lost")
