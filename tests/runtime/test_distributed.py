"""The same run on any number of ranks: what is equal to the bit, what to rounding, and how a lost rank ends it.

The ranks are processes on this machine that speak Gloo; see `tests.support.ranked`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import bench
from benchmarks.series import __main__ as lab
from grpo import train as train_module
from grpo.commands import evaluate
from grpo.config import TINY_WORLD_DIR
from grpo.run import resume as opening
from grpo.run.checkpoint import find_damage
from grpo.run.ending import stopped_early
from grpo.run.ledger import read_step
from grpo.run.resume import check_ranks_agree
from grpo.run.setup import Setup
from grpo.runtime import distributed as ranks_module
from grpo.runtime.distributed import (
    SINGLE_PROCESS,
    TORCHRUN_VARIABLES,
    RankLost,
    ReportedByMainRank,
    World,
    check_cards,
    init_world,
    launch_prefix,
)
from grpo.runtime.errors import UserError
from grpo.runtime.interrupts import Interrupted
from grpo.runtime.out_of_memory import OutOfMemory
from tests.support import ranked
from tests.support.ranked import on_ranks

ASKED: list[tuple[tuple[str, ...], str]] = [
    (("loss.beta=0.4", "optim.micro_batch_size=4"), ""),
    (("loss.beta=0.0", "loss.token_weights=token", "advantage.kind=batch", "optim.micro_batch_size=3"), ""),
    (("loss.beta=0.4", "optim.inner_epochs=2", "optim.max_grad_norm=0.001"), ""),
]
"""The recipe; DAPO's weights and one std for the batch, without KL, so that the third group's equal rewards make its
rows silent; two passes. Micro-batches are cut otherwise on every rank."""
TINY = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
STARTED = dict(zip(TORCHRUN_VARIABLES, ("0", "2", "0", "2", "127.0.0.1", "29400"), strict=True))
BOUND = 1e-7
"""Largest difference of a gradient's entry between numbers of ranks, where the largest entry is 0.02. Each rank adds up
its own rows in float32, so only the order of that sum differs; the sum over ranks is rounded once."""


@pytest.fixture(scope="module")
def one_rank(random_base: Path) -> dict[str, Any]:
    (found,) = on_ranks(1, ranked.one_step, random_base, ASKED)
    assert found is not None
    return found


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two updates' gradients."""
    assert a["grads"].keys() == b["grads"].keys() and a["grads"]
    return max(float(np.abs(grad - b["grads"][name]).max()) for name, grad in a["grads"].items())


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return apart(a, b) == 0 and all((value == b["tokens"][name]).all() for name, value in a["tokens"].items())


@pytest.mark.parametrize("size", [2, 4])
def test_three_groups_on_any_number_of_ranks_are_one_step(
    random_base: Path, one_rank: dict[str, Any], size: int
) -> None:
    """On 2 ranks one has two groups, on 4 one has none."""
    ranks = on_ranks(size, ranked.one_step, random_base, ASKED)
    for found in ranks:
        for (ids, logprobs), (right_ids, right_logprobs) in zip(found["rows"], one_rank["rows"], strict=True):
            assert ids == right_ids
            np.testing.assert_allclose(logprobs, right_logprobs, atol=1e-5, rtol=0)
        for here, first, whole in zip(found["updates"], ranks[0]["updates"], one_rank["updates"], strict=True):
            assert (here["advantages"] == whole["advantages"]).all() and (here["weights"] == whole["weights"]).all()
            assert same_bits(here, first), "every rank hands the same bits to its optimiser"
            assert apart(here, whole) < BOUND
            for name, values in whole["tokens"].items():
                np.testing.assert_allclose(here["tokens"][name], values, atol=1e-5, rtol=0)
            np.testing.assert_allclose(here["figures"], whole["figures"], rtol=1e-5, atol=1e-8)


def test_the_comparison_sees_a_gradient(one_rank: dict[str, Any]) -> None:
    for done in one_rank["updates"][:2]:
        assert max(np.abs(grad).max() for grad in done["grads"].values()) > 1e-3


def test_planted_faults_are_seen(random_base: Path, one_rank: dict[str, Any]) -> None:
    asked = [(ASKED[0][0], fault) for fault in ranked.WRONG_SUMS]
    found = on_ranks(2, ranked.one_step, random_base, asked)[0]
    off = {fault: apart(done, one_rank["updates"][0]) for (_, fault), done in zip(asked, found["updates"], strict=True)}
    assert off.pop("") < BOUND
    assert min(off.values()) > 1e-4, off


def test_a_rank_that_hangs_is_lost(tmp_path: Path) -> None:
    message = on_ranks(2, ranked.hang, 6.0)[0]
    assert message == "another rank did not respond within train.rank_timeout_s = 2 s"


def test_sums_are_exact_and_what_is_not_alike_is_named_once_for_all_ranks() -> None:
    tiny = 2.0**-24
    values = [[1.0, tiny, 1e8], [tiny, tiny, 1.0], [tiny, 1.0, -1e8], [tiny, tiny, 1.0]]
    assert sum(np.float32(row[0]) for row in values) == 1, "in float32 and in this order the small ones are lost"
    exact = [1 + 2.0**-22, 1 + 2.0**-22, 2.0]
    says = "the ranks differ from rank 0: rank 1, 2: other rollout.n; rank 3: other base, rollout.n"
    kinds = [UserError.__name__, *3 * [ReportedByMainRank.__name__]]
    assert on_ranks(4, ranked.told_apart, values) == [(exact, kind, says) for kind in kinds]


def test_alone_every_operation_is_the_identity() -> None:
    values = torch.tensor([1.0, float("nan")])
    before = values.clone()
    SINGLE_PROCESS.all_reduce_(values)
    SINGLE_PROCESS.broadcast_([values])
    assert torch.equal(values, before) or bool(values[1].isnan() and values[0] == 1)
    marker = object()
    assert SINGLE_PROCESS.all_gather_object(marker) == [marker] and SINGLE_PROCESS.broadcast_object(marker) is marker
    loss = torch.tensor(2.0)
    assert (
        SINGLE_PROCESS.all_reduce_gradients([], loss) is loss
        and list(SINGLE_PROCESS.slice_of(3)) == [0, 1, 2]
        and SINGLE_PROCESS.is_main
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_everything_is_somebodys_once(size: int, count: int) -> None:
    shares = [World(rank, size).slice_of(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A short run of the embedded model: three groups a step, one of them refilled where it can be. AdamW's ε is large
    against the rounding of a gradient: a step divides by the gradient's own size, and near 0 that makes rounding
    visible."""
    folder = tmp_path_factory.mktemp("world")
    rows = (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, chosen in (("cases", rows[:9]), ("held_out", rows[100:103])):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    values = {
        "cases.train": folder / "cases.jsonl",
        "rollout.prompts_per_step": 3,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 40,
        "rollout.resample_rounds": 1,
        "optim.micro_batch_size": 4,
        "optim.epsilon": 1e-3,
        "train.steps": 3,
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "evaluate.every": 9,
        "evaluate.thinking": '["off"]',
        "evaluate.max_new_tokens": 40,
        "evaluate.before_and_after": f'{{test = "{folder / "held_out.jsonl"}"}}',
        "evaluate.periodic": "{}",
        "train.rank_timeout_s": 120,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def whole(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert on_ranks(1, ranked.train, [TINY, *world, "--out", str(out)]) == [0]
    return out


def assert_same_run(out: Path, whole: Path, steps: int = 3) -> None:
    """Ids, rewards and advantages to the bit, figures to rounding."""
    metrics, wanted = lines(out / "metrics.jsonl"), lines(whole / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    for m, w in zip(metrics, wanted, strict=True):
        assert m.keys() == w.keys()
        for name in m.keys() - {k for k in m if k.startswith(("time/", "tokens_per_s/", "roofline/", "memory/"))}:
            atol = (
                1e-5 if name.startswith("sampler/") else 1e-6
            )  # differences of float32 log-probabilities near 10 nats
            right = w[name] if w[name] is None else pytest.approx(w[name], rel=1e-4, abs=atol)
            assert m[name] == right, name
    for number in range(1, steps + 1):
        entry, right = (read_step(folder / "ledger", number).step for folder in (out, whole))
        for group, other in zip(entry.groups, right.groups, strict=True):
            assert [c.ids for c in group.completions] == [c.ids for c in other.completions]
        assert entry.scores == right.scores and entry.replaced_groups == right.replaced_groups
        assert (entry.batch.advantages == right.batch.advantages).all()
    answers = [[(r["step"], r["exact"], r["confusion"]) for r in read(folder / "eval.json")] for folder in (out, whole)]
    assert answers[0] == answers[1]
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, whole)]
    for name, tensor in adapters[0].items():
        assert float((tensor - adapters[1][name]).abs().max()) < 1e-6


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(path: Path) -> None:
    wait_until(path.exists)


def wait_until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ranked.PATIENCE_S
    while not seen():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def test_a_run_of_four_ranks_is_the_run_of_one(world: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert on_ranks(4, ranked.train, [TINY, *world, "--out", str(out)], log=tmp_path) == [0] * 4
    assert_same_run(out, whole)
    assert any(m["groups/dropped"] for m in lines(out / "metrics.jsonl")), "nothing was refilled"
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(4)]
    assert "one of 4 ranks" in said[0] and not any("config  " in text or "adapter " in text for text in said[1:])


def test_a_rank_is_killed_and_the_run_goes_on_with_one_and_then_with_two(
    world: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = [TINY, *world, "--out", str(out)]
    two = ranked.Job(2, ranked.train_slowly, argv, 1.0, log=tmp_path)
    wait_for(out / "checkpoints" / "step_000001")
    os.kill(two.pid(1), signal.SIGKILL)
    assert two.results() == [4, None]
    said = (tmp_path / "rank0.log").read_text()
    assert said.count("error: ") == 1 and "another rank ended" in said
    assert "; if it printed a reason, fix that first. step_00000" in said

    one = ranked.Job(1, ranked.train_slowly, [*argv, "--resume"], 1.0, log=tmp_path)
    wait_for(out / "checkpoints" / "step_000002")
    os.kill(one.pid(0), signal.SIGTERM)
    assert one.results() in ([143], [0])
    others = ["--set", "train.rank_timeout_s=100"]  # no checkpoint depends on it
    assert on_ranks(2, ranked.train, [*argv, *others, "--resume"], log=tmp_path) == [0, 0]
    assert_same_run(out, whole)


def test_what_is_wrong_on_one_rank_stops_all_with_one_line(world: list[str], whole: Path, tmp_path: Path) -> None:
    assert on_ranks(2, ranked.train, [TINY, *world, "--out", str(whole)], log=tmp_path) == [2, 2]
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert said[0].count("error: ") == 1 and "already exists. Use --resume" in said[0] and "error" not in said[1]


@pytest.mark.parametrize(
    ("overrides", "fault", "says"),
    [
        (["--set", "rollout.temperature=0.9", "--set", "optim.beta1=0.8"], "", "optim.beta1, rollout.temperature"),
        ([], "another base", "model.name's weights"),
    ],
)
def test_a_rank_of_another_run_is_refused_before_the_folder_is_made(
    world: list[str], tmp_path: Path, overrides: list[str], fault: str, says: str
) -> None:
    out = tmp_path / "run"
    argv = [TINY, *world, "--out", str(out)]
    assert on_ranks(2, ranked.train_otherwise, argv, overrides, fault, log=tmp_path) == [2, 2]
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert said[0].count("error: ") == 1 and said[0].endswith(f"rank 1: other {says}\n") and "error" not in said[1]
    assert not out.exists()


def test_adapters_that_drift_apart_are_not_saved(world: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [TINY, *world, "--out", str(out)]
    assert on_ranks(2, ranked.train_otherwise, argv, [], "another adapter", log=tmp_path) == [2, 2]
    said = (tmp_path / "rank0.log").read_text()
    assert said.count("error: ") == 1 and "rank 1: other adapter" in said and not (out / "checkpoints").exists()


def test_a_rank_that_is_lost_before_a_save_does_not_take_the_step_with_it(world: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [TINY, *world, "--out", str(out)]
    assert on_ranks(2, ranked.train_otherwise, argv, [], "dies at the checkpoint", log=tmp_path) == [4, None]
    assert not find_damage(out / "checkpoints" / "step_000001")


def test_a_signal_at_one_rank_stops_both_before_the_same_update(world: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [TINY, *world, "--set", "checkpoint.every=100", "--out", str(out)]
    fault = "signalled before the second update"
    assert on_ranks(2, ranked.train_otherwise, argv, [], fault, log=tmp_path) == [143, 143]
    assert not find_damage(out / "checkpoints" / "step_000001")
    assert len(lines(out / "metrics.jsonl")) == 1


def test_a_signal_ends_the_wait_for_a_rank_that_hangs_and_the_step_is_kept(world: list[str], tmp_path: Path) -> None:
    """In processes that end as Python ends them: torch's threads still wait then."""
    out = tmp_path / "run"
    argv = [TINY, *world, "--set", "checkpoint.every=100", "--out", str(out)]
    code = (
        "import sys; from tests.support import ranked; "
        "ranked.train_and_leave(sys.argv[1:], 'stopped in the second rollout')"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        started = STARTED | {"MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            env={**os.environ, **started, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in (0, 1)
    ]
    try:
        wait_until(lambda: stopped(processes[1].pid))
        time.sleep(2)  # rank 0 has done its own share
        processes[0].terminate()
        _, said = processes[0].communicate(timeout=20)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 143, said
    assert "SIGTERM (torchrun sends it when another rank has ended). step_000001 is saved." in said
    assert "Resume with: torchrun --standalone --nproc-per-node 2 -m grpo train" in said
    assert not find_damage(out / "checkpoints" / "step_000001")


@pytest.mark.parametrize(
    ("rank", "error", "requested", "code", "message"),
    [
        (0, RankLost("another rank ended"), None, 4, "\nerror: rank 0: another rank ended{advice}. hint\n"),
        (1, RankLost("another rank ended"), None, 4, "\nerror: rank 1: another rank ended{advice}. hint\n"),
        (2, RankLost("another rank ended"), None, 4, ""),
        (0, RankLost("another rank ended"), signal.SIGTERM, 143, "\nstopped by SIGTERM{torchrun}{advice}. hint\n"),
        (1, RankLost("x"), signal.SIGTERM, 143, "\nrank 1: stopped by SIGTERM{torchrun}{advice}. hint\n"),
        (2, RankLost("another rank ended"), signal.SIGTERM, 143, ""),
        (0, RankLost("another rank ended"), signal.SIGINT, 130, "\nstopped by SIGINT. hint\n"),
        (1, RankLost("another rank ended"), signal.SIGINT, 130, ""),
        (0, Interrupted(signal.SIGTERM), signal.SIGTERM, 143, "\nstopped by SIGTERM{torchrun}. hint\n"),
        (1, Interrupted(signal.SIGTERM), signal.SIGTERM, 143, ""),
    ],
)
def test_one_rank_prints_how_to_resume_when_a_rank_is_lost(
    rank: int,
    error: Interrupted | RankLost,
    requested: int | None,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also if rank 0 is the one that is lost."""
    assert stopped_early(error, requested, World(rank, 3), "hint") == code
    torchrun = " (torchrun sends it when another rank has ended)"
    advice = "; if it printed a reason, fix that first"
    assert capsys.readouterr().err == message.format(advice=advice, torchrun=torchrun)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OutOfMemory("a micro-batch of 4 rows does not fit"), "error: rank 1: a micro-batch of 4 rows does not fit\n"),
        (ReportedByMainRank("rank 0 has printed this"), ""),
    ],
)
def test_rank_1_prints_an_error_of_its_own_and_not_one_of_rank_0(
    error: UserError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    @contextlib.contextmanager
    def joined_as_rank_1(*_: Any, **__: Any) -> Iterator[World]:
        yield World(1, 2)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train_module, "init_world", joined_as_rank_1)
    monkeypatch.setattr(train_module, "run_training", fails)
    monkeypatch.setattr(train_module, "QUIET_EXIT_DELAY_S", 0.0)
    assert train_module.main([TINY, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message) if message else not printed


def test_one_rank_hashes_nothing_to_be_at_one_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "input_hashes", lambda setup: pytest.fail("the inputs were read"))
    policy = SimpleNamespace(world=SINGLE_PROCESS, model=torch.nn.Linear(1, 1))
    check_ranks_agree(cast(Setup, SimpleNamespace(policy=policy)))


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_what_is_wrong_before_the_ranks_have_joined_is_said_once(tmp_path: Path) -> None:
    """And the rank that is silent ends last: the first end of one is the end of all."""
    started = time.monotonic()
    assert on_ranks(2, ranked.train, [TINY, "--set", "loss.betta=1"], log=tmp_path) == [2, 2]
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert said[0].count("error: ") == 1 and not said[1]
    assert time.monotonic() - started >= ranks_module.QUIET_EXIT_DELAY_S


@pytest.mark.parametrize("program", [evaluate, bench, lab])
def test_programs_of_one_process_refuse_more(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks_module, "QUIET_EXIT_DELAY_S", 0.0)
    for rank, count in ((0, 1), (1, 0)):
        for name, value in (STARTED | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            program.main([])
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.count("does not support torchrun: run it as a single process") == count


@pytest.mark.parametrize(
    ("size", "beside", "starts"),
    [
        (1, "1", "python -m"),
        (2, "2", "torchrun --standalone --nproc-per-node 2 -m"),
        (16, "8", "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 8 -m"),
    ],
)
def test_the_command_that_goes_on_starts_as_many_ranks(
    size: int, beside: str, starts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert launch_prefix(World(0, size)) == starts


def test_torchrun_starts_it(world: list[str], whole: Path, tmp_path: Path) -> None:
    """One step, as the hint of an interrupted run starts it."""
    out = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "grpo", "train"]
    short = ["--set", "train.steps=1", "--set", "evaluate.before_and_after={}", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, TINY, *world, *short],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        encoding="utf-8",
        timeout=ranked.PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("config  ") == 1 and (out / "adapter").is_dir()
    rewards = [lines(folder / "metrics.jsonl")[0]["reward/mean"] for folder in (out, whole)]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("environment", "device", "cards", "says"),
    [
        ({"RANK": "0"}, "cpu", 0, "LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not: launch"),
        ({"WORLD_SIZE": "2"}, "cpu", 0, "unset RANK and WORLD_SIZE to run one process"),
        ({**STARTED, "RANK": "one"}, "cpu", 0, "RANK='one', WORLD_SIZE='2'"),
        ({**STARTED, "RANK": "2"}, "cpu", 0, "RANK='2', WORLD_SIZE='2'"),
        ({**STARTED, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, "auto", 2, "3 ranks on a host with 2 CUDA device(s)"),
        (STARTED, "cuda", 0, "2 ranks on a host with 0 CUDA device(s)"),
        ({**STARTED, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "cuda:5", 1, "this machine has 1 CUDA device(s)"),
        (STARTED, "cuda:0", 2, 'model.device = "cuda:0" is one card, but there are 2 ranks'),
    ],
)
def test_half_an_environment_and_too_few_cards_are_refused(
    environment: dict[str, str], device: str, cards: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(UserError) as raised, init_world(device, timeout_s=5):
        pass
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("cards", "local", "wanted"),
    [(1, 0, "cuda:0"), (1, 3, "cuda:0"), (4, 0, "cuda:0"), (4, 3, "cuda:3"), (0, 3, "cpu")],
)
def test_a_rank_takes_its_own_card_or_the_only_one_it_sees(
    cards: int, local: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert ranks_module._rank_device("auto", 4, local, 4) == torch.device(wanted)


@pytest.mark.parametrize(
    ("uuids", "says"),
    [("abc", ""), ("aba", r"^ranks 0, 2 use one CUDA device \(a\), and each needs its own"), ("bcc", "ranks 1, 2 use")],
)
def test_two_ranks_on_one_card_are_refused_on_every_rank(uuids: str, says: str) -> None:
    """Over the store by which the ranks meet, before NCCL is asked."""
    store = torch.distributed.HashStore()
    for rank, uuid in enumerate(uuids):
        store.set(f"card of rank {rank}", uuid)
    for rank, uuid in enumerate(uuids):
        with pytest.raises(match=says) if says else contextlib.nullcontext():
            check_cards(store, rank, 3, uuid)


def test_the_timeout_is_our_own_and_comes_before_the_watchdogs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective that never ends raises here, although torch waits longer: NCCL's watchdog would end the process."""
    asked: dict[str, Any] = {}

    def init(backend: str, **options: Any) -> None:
        asked.update(options, backend=backend)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (STARTED | {"WORLD_SIZE": "1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    ranks_module._connect(torch.device("cpu"), 7)
    assert asked["timeout"].total_seconds() == 7 + ranks_module.WATCHDOG_S and asked["backend"] == "gloo"

    started = time.monotonic()
    with pytest.raises(RankLost, match=r"^another rank did not respond within train\.rank_timeout_s = 0\.3 s$"):
        World(0, 2, timeout_s=0.3)._run(time.sleep, 5)
    assert 0.3 <= time.monotonic() - started < 5


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with init_world("auto", timeout_s=5) as ranks:
        assert ranks is SINGLE_PROCESS
