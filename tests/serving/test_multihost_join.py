"""How ranks find each other, agree and end, as threads; and where groups come from."""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import jax
import jaxlib.version
import msgspec
import pytest

from jaxserve.errors import ConfigError, JaxserveError, UnavailableError, UsageError
from jaxserve.serving.engine import Engine
from jaxserve.serving.fake_runner import FakeRunner
from jaxserve.serving.multihost import follower as follower_module
from jaxserve.serving.multihost import greeting, messages
from jaxserve.serving.multihost import leader as leader_module
from jaxserve.serving.multihost.environment import Found, choose, find, first_node
from jaxserve.serving.multihost.follower import Follower
from jaxserve.serving.multihost.greeting import listen
from jaxserve.serving.multihost.group import Group, named
from jaxserve.serving.multihost.identity import identity_of, layout_hash, model_hash
from jaxserve.serving.multihost.leader import Leader
from jaxserve.serving.multihost.leading_runner import LeadingRunner
from jaxserve.serving.multihost.messages import Identity
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.plan import SchedulerConfig
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.wire import Start

from .test_multihost_faults import free_port

SECRET = b"sixteen bytes or more"
SAME = Identity("1", "1", "1", "1", "3", "ab", "cd", 3)
LIMITS = SchedulerConfig(
    page_size=8,
    groups=(GroupLimits(num_pages=64),),
    num_slots=4,
    max_step_tokens=16,
    max_context_tokens=64,
)


@pytest.fixture(autouse=True)
def _processes_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps a lost group from ending the process of the tests."""
    for module in (leader_module, follower_module):
        monkeypatch.setattr(module, "end_process", lambda reason: None)


class Thread(threading.Thread):
    """Runs a call and keeps what it gave, or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call, self.result, self.error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except Exception as error:
            self.error = error

    def given(self) -> Any:
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def ranks(
    size: int = 3, changes: dict[int, dict[str, Any]] | None = None, **identities: Identity
) -> list[Thread]:
    """Returns the threads in which ranks join."""
    port, threads = free_port(), []
    for rank in range(size):
        fields: dict[str, Any] = {"secret": SECRET, "join_s": 10.0}
        fields |= (changes or {}).get(rank, {})
        group = Group(f"127.0.0.1:{port}", size, rank, **fields)
        identity = identities.get(f"rank{rank}", SAME)
        join = Leader.gather if group.leads else Follower.join
        threads.append(Thread(lambda join=join, g=group, i=identity: join(g, i)))
    return threads


def joined(size: int = 3) -> tuple[Leader, list[Follower]]:
    leader, *followers = [thread.given() for thread in ranks(size)]
    return leader, followers


def losses(party: Leader | Follower) -> list[str]:
    """Returns a list that gets the reason when the party is lost."""
    reasons: list[str] = []
    party.on_lost = reasons.append
    return reasons


def wait(true: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def answers(engine: Engine, count: int) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}

    def sink(event: TokenEvent) -> None:
        assert event.error is None
        tokens.setdefault(event.request_id, []).extend(event.token_ids)

    params = SamplingParams(temperature=0.0, seed=0, max_tokens=20).resolved({})
    for index in range(count):
        prompt = tuple((index * 13 + at) % 90 for at in range(3 + index))
        engine.submit(Request(id=f"r{index}", prompt=prompt, params=params), sink)
    while engine.step():
        pass
    return tokens


def test_ranks_agree_on_the_least_and_run_the_same_plans() -> None:
    leader, followers = joined()
    parties = [leader, *followers]
    brought = [Thread(lambda p=p, v=v: p.agree("room", v)) for p, v in zip(parties, (7, 5, 9))]  # noqa: B905
    assert [thread.given() for thread in brought] == [5, 5, 5]
    for party in parties:
        party.serve()
    runners = [FakeRunner(LIMITS) for _ in followers]
    lost = [losses(party) for party in parties]
    following = [
        Thread(lambda f=f, r=r: f.follow(r)) for f, r in zip(followers, runners, strict=True)
    ]
    own = FakeRunner(LIMITS)
    engine = Engine(LeadingRunner(own, leader), LIMITS)
    assert answers(engine, 6) == answers(Engine(FakeRunner(LIMITS), LIMITS), 6)
    engine.reset()
    assert len(answers(engine, 3)) == 3
    wait(lambda: all(runner.plans == own.plans for runner in runners))
    ended = Thread(leader.leave)
    for thread, follower in zip(following, followers, strict=True):
        thread.given()
        follower.leave()
    ended.given()
    assert lost == [[], [], []]
    assert all(runner.resets == 1 for runner in runners)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"jaxserve": "0.0"}, r"another version of jaxserve \(0.0\) than rank 0 \(1\)"),
        ({"jax": "0.0"}, "another version of JAX"),
        ({"jaxlib": "0.0"}, "another version of jaxlib"),
        ({"libtpu": "none"}, r"another version of libtpu \(none\) than rank 0 \(1\)"),
        ({"python": "2"}, "another version of Python"),
        ({"model": "ef"}, r"another model \(ef\) than rank 0 \(cd\)"),
        ({"layout": "xy"}, "another layout or other sizes"),
        ({"num_processes": 4}, "another number of processes"),
    ],
    ids=["jaxserve", "jax", "jaxlib", "libtpu", "python", "model", "layout", "size"],
)
def test_a_rank_of_another_kind_is_named_to_all(changed: dict[str, Any], words: str) -> None:
    fields = {name: getattr(SAME, name) for name in SAME.__struct_fields__}
    for thread in ranks(rank2=Identity(**(fields | changed))):
        with pytest.raises(JaxserveError, match=f"rank 2 has {words}"):
            thread.given()


def test_a_rank_with_another_secret_is_not_taken_and_then_missing() -> None:
    changes: dict[int, dict[str, Any]] = {2: {"secret": b"quite another secret"}}
    leader, one, two = ranks(changes={**changes, 0: {"join_s": 1.5}})
    with pytest.raises(ConfigError, match="rank 2 has another secret than rank 0"):
        two.given()
    with pytest.raises(UnavailableError, match=r"rank 2 of 3 did not come within 1\.5 s"):
        leader.given()
    with pytest.raises(UnavailableError, match="rank 2 of 3 did not come"):
        one.given()


def test_a_rank_0_without_the_secret_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "proved", lambda *_: True)  # an impostor takes anyone
    leader, one = ranks(2, {0: {"secret": b"quite another secret", "join_s": 2.0}})
    with pytest.raises(ConfigError, match="what answers as rank 0 has another secret"):
        one.given()
    leader.join(30)


def test_a_rank_that_comes_twice_waits_for_the_first_to_go() -> None:
    port = free_port()
    groups = [Group(f"127.0.0.1:{port}", 2, rank, SECRET, join_s=1.0) for rank in range(2)]
    identity = Identity("1", "1", "1", "1", "3", "ab", "cd", 2)
    leader = Thread(lambda: Leader.gather(groups[0], identity))
    first = Thread(lambda: Follower.join(groups[1], identity)).given()
    leader.given()
    with pytest.raises(UnavailableError, match=r"rank 0 at 127\.0\.0\.1"):
        Follower.join(groups[1], identity)
    first.leave()


def test_a_failure_on_one_rank_is_told_to_all() -> None:
    leader, (one, two) = joined()
    lost = [losses(leader), losses(one), losses(two)]
    one.break_off("no weights")
    wait(lambda: lost[0] and lost[2])
    assert lost[0] == lost[2] == ["rank 1 broke off: no weights"]


def test_a_step_that_fails_on_rank_0_ends_the_group() -> None:
    leader, (one, two) = joined()
    lost = [losses(leader), losses(one), losses(two)]
    runner = FakeRunner(LIMITS)
    runner.fail_dispatch(ValueError("a bad step"))
    engine = Engine(LeadingRunner(runner, leader), LIMITS)
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=4).resolved({})
    engine.submit(Request(id="a", prompt=(1, 2), params=params), lambda event: None)
    engine.step()
    assert lost[0] == ["a step failed on rank 0 (ValueError)"]
    wait(lambda: lost[1] and lost[2])


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (
            {
                "LWS_LEADER_ADDRESS": "pod-0.svc",
                "LWS_GROUP_SIZE": "4",
                "LWS_WORKER_INDEX": "2",
                "TPU_WORKER_HOSTNAMES": "other",
                "TPU_WORKER_ID": "0",
            },
            Found("LeaderWorkerSet", "pod-0.svc", 4, 2),
        ),
        (
            {
                "SLURM_STEP_NODELIST": "tpu[03-06,9],x1",
                "SLURM_NTASKS": "5",
                "SLURM_PROCID": "1",
                "SLURM_JOB_ID": "12345",
            },
            Found("Slurm", "tpu03", 5, 1, 21000 + 2 * (12345 % 5000)),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "a.b, c.d", "TPU_WORKER_ID": "1"},
            Found("GKE", "a.b", 2, 1),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"SLURM_NTASKS": "2"}, None),
        ({}, None),
    ],
    ids=["lws", "slurm", "gke", "one host", "half", "nothing"],
)
def test_a_group_is_found_in_the_environment(environ: dict[str, str], found: Found | None) -> None:
    assert find(environ) == found


@pytest.mark.parametrize("hosts", ["10.0.0.2,10.0.0.3", "n:0:10.0.0.2,n:1:10.0.0.3"])
def test_a_tpu_vm_is_asked_for_its_group(hosts: str) -> None:
    told = {"agent-worker-number": "1", "worker-network-endpoints": hosts}
    assert find({}, told.get) == Found("Cloud TPU", "10.0.0.2", 2, 1)
    assert find({"TPU_SKIP_MDS_QUERY": "1"}, told.get) is None
    assert find({}, {}.get) is None


def test_nodes_of_slurm() -> None:
    lists = {
        "n1": "n1",
        "n[1-2]-x,m": "n1-x",
        "m,n[1]": "m",
        "a[1-2]b[3]": "a1b3",
        "r[01-04,6]n[007,9-12]s,x": "r01n007s",
        "[3-4]": "3",
    }
    assert {nodes: first_node(nodes) for nodes in lists} == lists


@pytest.mark.parametrize("nodes", ["", ",a", "n[1-2", "n1]", "n[[1]]", "n[a-b]", "n[]", "n1 n2"])
def test_what_is_no_list_of_nodes_is_refused(nodes: str) -> None:
    with pytest.raises(ConfigError, match="is no list of nodes"):
        first_node(nodes)


def test_options_go_before_the_environment_and_belong_together() -> None:
    environ = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
    group = choose(environ, secret=SECRET)
    assert group is not None
    assert (group.coordinator, group.process_id, group.plans) == ("a:8476", 1, ("a", 8477))
    whole = choose({}, coordinator="127.0.0.1:99", num_processes=2, process_id=0)
    assert whole is not None and whole.leads
    assert choose({}, coordinator="127.0.0.1:99", num_processes=1, process_id=0) is None
    assert choose({}) is None
    with pytest.raises(UsageError, match="--process-id is missing"):
        choose({}, coordinator="127.0.0.1:99", num_processes=2)
    with pytest.raises(UsageError, match="--group-secret-file"):
        choose(environ)
    with pytest.raises(ConfigError, match="must be numbers"):
        find({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coordinator": "127.0.0.1"}, "no HOST:PORT"),
        ({"coordinator": "127.0.0.1:65535"}, "no HOST:PORT"),
        ({"num_processes": 1}, "from 2 to"),
        ({"process_id": 2}, "from 0 to 1"),
        ({"secret": b"short"}, "at least 16"),
        ({"join_s": 0.0}, "must be above 0"),
    ],
)
def test_a_group_is_valid_by_construction(fields: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"coordinator": "127.0.0.1:9", "num_processes": 2, "process_id": 1}
    with pytest.raises(UsageError, match=words):
        Group(**(given | fields))


def test_names_of_ranks() -> None:
    assert named([3]) == "rank 3"
    assert named([1, 3, 5]) == "ranks 1, 3 and 5"


SHAPES: dict[str, Any] = {
    "max_sequences": 3,
    "max_step_tokens": 99,
    "page_size": 32,
    "kv_bytes": 1 << 20,
}
QUEUES: dict[str, Any] = {
    "prefix_cache": False,
    "policy": "fair",
    "client_weights": {"a": 2.0},
    "max_prefill_tokens": 7,
    "max_queued_requests": 3,
    "max_queued_tokens": 3,
    "max_in_flight": 1,
    "strict": True,
}


def test_what_shapes_a_step_is_in_the_hash_and_nothing_else() -> None:
    first = layout_hash(Start("tiny", options=EngineOptions()))
    assert layout_hash(Start("other", launched_s=3.0, log_json=False)) == first
    assert layout_hash(Start("tiny", dtype="float32")) != first
    options = {field.name for field in dataclasses.fields(EngineOptions)}
    assert SHAPES.keys() | QUEUES.keys() == options, "a new option belongs to one of them"
    assert layout_hash(Start("tiny", options=EngineOptions(**QUEUES))) == first
    for name, value in SHAPES.items():
        assert layout_hash(Start("tiny", options=EngineOptions(**{name: value}))) != first


def test_versions_are_those_of_the_installed_packages(tmp_path: Any) -> None:
    found = identity_of(Start("tiny"), tmp_path, 2)
    assert (found.jax, found.jaxlib) == (jax.__version__, jaxlib.version.__version__)
    assert found.libtpu == ("none" if find_spec("libtpu") is None else version("libtpu"))
    with pytest.MonkeyPatch.context() as patch:

        def absent(name: str) -> str:
            raise PackageNotFoundError(name)

        patch.setattr("importlib.metadata.version", absent)
        assert identity_of(Start("tiny"), tmp_path, 2).libtpu == "none"


def test_every_byte_of_a_header_and_much_of_the_weights_is_in_the_hash(tmp_path: Any) -> None:
    size, header = 64 << 20, 5 << 20
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.write(header.to_bytes(8, "little"))
        file.truncate(size)
    first = model_hash(tmp_path)
    os.utime(weights, (1, 1))
    assert model_hash(tmp_path) == first, "times do not count"

    def sees(start: int, length: int) -> bool:
        """Returns whether a change of these bytes alone is seen."""
        with weights.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * length)
            file.flush()
            seen = model_hash(tmp_path) != first
            file.seek(start)
            file.write(bytes(length))
        return seen

    assert all(sees(at, 1) for at in (8, 3_333_333, header + 7, size - 1))
    # However placed, what is longer than the space between two samples meets one of them.
    assert all(sees(at, size // 31) for at in range(header + 8, size - size // 31, 9 << 20))
    assert not sees(size // 62 * 31, 1), "docs/pods.md says so"


def test_models_that_differ_have_other_hashes(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    first = model_hash(tmp_path)
    assert model_hash(tmp_path) == first
    weights.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert model_hash(tmp_path) != first
    weights.write_bytes(bytes(3 << 20))
    (tmp_path / "config.json").write_text("{ }")
    assert model_hash(tmp_path) != first


def answer(port: int, rank: int, secret: bytes) -> Any:
    """Returns what rank 0 says to who answers its challenge."""
    with socket.create_connection(("127.0.0.1", port + 1), timeout=10) as sock:
        challenge = messages.receive(sock, messages.TO_MEMBER)
        assert isinstance(challenge, messages.Challenge)
        given = messages.Answer(rank, bytes(32), messages.encode_identity(SAME), b"")
        proof = messages.answer_proof(secret, challenge.nonce, given)
        sock.sendall(messages.packed(msgspec.structs.replace(given, proof=proof)))
        return messages.receive(sock, messages.TO_MEMBER)


@pytest.mark.parametrize("rank", [3, 2**31, 2**63, -1])
@pytest.mark.parametrize("secret", [SECRET, b"quite another secret"])
def test_a_rank_that_there_is_not_is_refused(rank: int, secret: bytes) -> None:
    port = free_port()
    group = Group(f"127.0.0.1:{port}", 3, 0, SECRET, join_s=1.0)
    leader = Thread(lambda: Leader.gather(group, SAME))
    wait(lambda: listens(port + 1))
    told = answer(port, rank, secret)
    why = "is none of 1 to 2" if secret == SECRET else "has another secret than rank 0"
    assert told == messages.Rejected(f"rank {rank} {why}", again=False)
    with pytest.raises(JaxserveError, match=r"did not come|is none of"):
        leader.given()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("host", ["[::1]", "localhost", "127.0.0.1"])
def test_a_group_forms_over_either_family(host: str) -> None:
    port = free_port()
    groups = [Group(f"{host}:{port}", 2, rank, SECRET, join_s=5.0) for rank in range(2)]
    same = msgspec.structs.replace(SAME, num_processes=2)
    leader = Thread(lambda: Leader.gather(groups[0], same))
    Follower.join(groups[1], same).leave()
    leader.given()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_rank_0_with_a_name_is_reached_over_either_family(address: str) -> None:
    port = free_port()
    group = Group(f"some-name:{port}", 2, 0, SECRET, join_s=5.0)
    with listen(group) as listener, socket.create_connection((address, port + 1), timeout=5):
        listener.settimeout(5)
        listener.accept()[0].close()


def test_a_greeting_in_drops_ends_at_its_deadline() -> None:
    ours, theirs = socket.socketpair()
    until = messages.Deadline(0.3)
    drops = iter(messages.packed(messages.Pulse(1, b"x" * 200)))

    def drip() -> None:
        with contextlib.suppress(OSError):
            for drop in drops:
                ours.sendall(bytes([drop]))
                until_next.wait(0.02)

    until_next = threading.Event()
    with ours, theirs:
        began = time.monotonic()
        dripping = Thread(drip)
        with pytest.raises(TimeoutError):
            messages.receive(theirs, messages.TO_LEADER, until=until)
        assert time.monotonic() - began < 2.0
        until_next.set()
    dripping.join(10)
    assert next(drops, None) is not None, "it was cut short"


def test_a_frame_that_is_too_long_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((1 << 20).to_bytes(4, "little"))
        with pytest.raises(ValueError, match="a frame of 1,048,576 bytes"):
            messages.receive(theirs, messages.TO_LEADER, 1 << 10)
