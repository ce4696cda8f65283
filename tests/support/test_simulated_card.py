"""The commands on a simulated card (see `tests.support.simulated_card`), each as small as it can be."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import benchmarks.roofline as roofline
import grpo.engine.sampling as sampling_module
import grpo.policy.policy as policy_module
import grpo.train as train_module
import grpo.update as update_module
from benchmarks.bench import main as bench
from grpo.commands.evaluate import main as evaluate
from grpo.commands.merge import main as merge
from grpo.commands.replay import main as replay
from grpo.commands.triage import main as triage
from grpo.config import resolve_path
from grpo.evaluation import during_training
from grpo.inspection.replay import TIMING_PREFIXES
from grpo.run.folder import RunFolder, read_evaluations
from grpo.train import main as train
from tests.support.ranked import on_ranks
from tests.support.simulated_card import WrongCard, simulated_card

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: see tests/test_gpu.py")
ALWAYS = range(sys.maxsize)
SMALL = (
    "model.dtype=float32",
    "lora.r=16",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "rollout.max_new_tokens=44",  # some answers end, some are cut: rewards differ, and rows leave the decoder
    "rollout.temperature=1.5",
    'rollout.thinking="off"',
    "optim.micro_batch_size=4",
    "evaluate.max_new_tokens=44",
    "evaluate.periodic={}",
    'evaluate.thinking=["off"]',
)
RUN = ("train.steps=2", "checkpoint.every=1")


def small(cases: Path, *more: str) -> list[str]:
    """Arguments that name the tiny config with 8 cases to train on and 2 to evaluate."""
    sets = (
        f'cases.train="{cases / "train.jsonl"}"',
        f'evaluate.before_and_after={{ test = "{cases / "test.jsonl"}" }}',
    )
    return ["configs/tiny.toml", *(part for value in (*SMALL, *sets, *more) for part in ("--set", value))]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The run's metrics without those that depend on the machine's speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMING_PREFIXES)} for line in lines]


def check_near(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Let two lines of metrics differ by rounding alone."""
    assert {name for name in ours if ours[name] is None} == {name for name in theirs if theirs[name] is None}
    numbers = [{name: value for name, value in line.items() if value is not None} for line in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5)


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def _slow_card() -> Iterator[None]:
    """A CPU takes a minute for the product by which a card's rate is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofline.MATMUL_SIZE, "cuda", 128)
        patch.setitem(roofline.MOST_BYTES, "cuda", 1 << 20)
        patch.setattr(roofline, "MEASURE_SECONDS", 0.01)
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of few cases."""
    folder = tmp_path_factory.mktemp("cases")
    for name, count in (("train", 8), ("test", 2)):
        lines = resolve_path(f"embedded:cases/{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture(scope="module")
def run(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole steps on the second of two cards, with an evaluation before and after."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with simulated_card(index=1, cards=2) as card:
        assert train([*small(cases, *RUN, "model.device=cuda:1"), "--out", str(out)]) == 0
        assert card.replays > 0 and card.current == 1
    return out


# --- the simulation itself -------------------------------------------------------------------------------------------


def test_devices_do_not_mix() -> None:
    with simulated_card():
        here, there = torch.ones(2, device="cuda:0"), torch.ones(2)
        assert here.device == torch.device("cuda", 0) and here.is_cuda and (here + 1).tolist() == [2.0, 2.0]
        for mixed in (
            lambda: here + there,
            lambda: there.add_(here),
            lambda: torch.cat([here, there]),
            lambda: there[here.long()],
            lambda: here.index_put_((torch.tensor([0]),), torch.ones(1)),
            lambda: nn.functional.linear(here, there),
        ):
            with pytest.raises(RuntimeError, match="cpu and cuda:0"):
                mixed()
        with pytest.raises(TypeError, match="Use Tensor.cpu"):
            here.numpy()
        assert (here * torch.tensor(3.0)).is_cuda and here[torch.tensor([1])].is_cuda and not here.cpu().is_cuda


def test_a_card_of_another_process_is_out_of_bounds() -> None:
    with simulated_card(index=1, cards=2):
        with pytest.raises(WrongCard, match="made on cuda:0"):
            torch.ones(2).to("cuda")  # the current card is 0 until somebody sets another
        with pytest.raises(ValueError, match="specified index"):
            torch.cuda.set_device(torch.device("cuda"))
        with pytest.raises(torch.AcceleratorError, match="invalid device ordinal"):
            torch.cuda.set_device(2)
        torch.cuda.set_device("cuda:1")
        assert torch.ones(2).to("cuda").get_device() == 1


@torch.inference_mode()
def test_a_graph_replays_what_was_captured() -> None:
    with simulated_card():
        x, graph = torch.zeros(2, device="cuda:0"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            y = (x * 2).mul_(3)
            with pytest.raises(torch.AcceleratorError, match="capturing"):
                x.sum().item()
        assert x.tolist() == [0.0, 0.0], "a capture runs nothing"
        for count in (1.0, 2.0):
            graph.replay()
            assert (x.tolist(), y.tolist()) == ([count] * 2, [6 * count] * 2)


def test_gradients_reach_the_card_and_tied_weights_stay_tied() -> None:
    with simulated_card():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        model.to("cuda:0")
        assert model[1].weight is model[0].weight and model[0].weight.is_cuda
        model(torch.ones(1, 3, device="cuda:0")).sum().backward()
        assert model[0].weight.grad is not None and model[0].weight.grad.is_cuda


def test_memory_runs_out_where_it_is_asked_to() -> None:
    work = type("Work", (), {"do": staticmethod(lambda: torch.zeros(2, device="cuda:0") + 1)})
    with simulated_card() as card, card.out_of_memory(work, "do", calls=(1,), after=1) as failed:
        work.do()
        with pytest.raises(torch.OutOfMemoryError):
            work.do()
        work.do()
    assert failed == [1]


def test_everything_is_put_back() -> None:
    def names() -> list[dict[str, Any]]:
        return [dict(vars(owner)) for owner in (torch.cuda, torch.Tensor, nn.Module, torch, torch.accelerator)]

    with simulated_card():  # what is imported on the way in stays
        pass
    before = names()
    with simulated_card():
        assert torch.cuda.is_available() and names() != before
    assert names() == before and not torch.cuda.is_available()


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_train(run: Path, cases: Path, tmp_path: Path, device: str) -> None:
    """On the first of two cards, with the numbers of the second."""
    with simulated_card(cards=2):
        overrides = ("train.steps=1", "evaluate.before_and_after={}", f"model.device={device}")
        assert train([*small(cases, *overrides), "--out", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run")[0] == metrics(run)[0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["machine"]["device"] == "simulated card 0"


def test_train_on_the_second_card(run: Path, cases: Path, tmp_path: Path) -> None:
    """A CPU finds the same, but for its other chunks."""
    assert json.loads((run / "config.json").read_text())["machine"]["device"] == "simulated card 1"
    assert (
        train([*small(cases, *RUN, "evaluate.before_and_after={}", "model.device=cpu"), "--out", str(tmp_path / "run")])
        == 0
    )
    for ours, theirs in zip(metrics(run), metrics(tmp_path / "run"), strict=True):
        check_near(ours, theirs)
    assert all(line["grad_norm"] > 0 and line["reward/std_group"] > 0 for line in metrics(run))


def test_a_resumed_run_is_the_uninterrupted_one(
    run: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, prompts_for_step = (
        [*small(cases, *RUN, "model.device=cuda:1"), "--out", str(tmp_path / "run")],
        train_module.prompts_for_step,
    )

    def interrupted(*given: Any) -> Any:
        if given[4] == 1:
            raise KeyboardInterrupt
        return prompts_for_step(*given)

    with simulated_card(index=1, cards=2):
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "prompts_for_step", interrupted)
            assert train(asked) == 130
        assert len(metrics(tmp_path / "run")) == 1
        assert train([*asked, "--resume"]) == 0
    assert metrics(tmp_path / "run") == metrics(run)
    assert adapter(tmp_path / "run") == adapter(run)


def test_evaluate(run: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    argv = [*small(cases, "model.device=cuda:1"), "--adapter", str(run / "adapter"), "--out", str(out)]
    with simulated_card(index=1, cards=2):
        assert evaluate(argv) == 0
    (record,) = json.loads((out / "eval.json").read_text())["records"]
    (last,) = [record for record in read_evaluations(RunFolder(run)) if record["step"] == 2]
    assert {name: record[name] for name in last if name != "step"} == {k: v for k, v in last.items() if k != "step"}


def test_merge(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with simulated_card():
        assert merge([str(run / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["check"]["agree"] > 0


def test_triage(run: Path) -> None:
    argv = ["chest pain, 120/58", "--adapter", str(run / "adapter"), "--device", "cuda:1", "--max-new-tokens", "10"]
    with simulated_card(index=1, cards=2) as card:
        assert triage(argv) in (0, 1)
        assert card.replays > 0


def test_bench(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with simulated_card(index=1, cards=2):
        assert bench([*small(cases, "model.device=cuda:1"), "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "simulated card 1" in shown and "on the device" in shown and "aim" in shown


def test_replay_with_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with simulated_card(index=1, cards=2):
        assert replay([str(run), "--model", "--json"]) == 0
    for step in json.loads(capsys.readouterr().out)["model"]["steps"]:
        assert step["reference"]["largest"] == step["policy"]["largest"] == 0


def train_on_own_card(argv: list[str]) -> tuple[int, list[str], int]:
    """A rank: its exit code, the backends it asked for, and its current card."""
    with simulated_card(index=int(os.environ["LOCAL_RANK"]), cards=2) as card:
        return train(argv), card.backends, card.current


def test_two_ranks_each_on_its_own_card(run: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*small(cases, *RUN, "model.device=cuda", "evaluate.before_and_after={}"), "--out", str(out)]
    found = on_ranks(2, train_on_own_card, argv, log=tmp_path)
    assert found == [(0, ["nccl"], 0), (0, ["nccl"], 1)], (tmp_path / "rank0.log").read_text()
    for ours, theirs in zip(metrics(out), metrics(run), strict=True):
        check_near(ours, theirs)


# --- out of memory ---------------------------------------------------------------------------------------------------


def test_an_update_that_does_not_fit_is_halved_for_the_rest_of_the_run(
    run: Path, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with simulated_card() as card, card.out_of_memory(update_module, "forward_backward", after=300) as failed:
        assert train([*small(cases, *RUN, "evaluate.before_and_after={}", "model.device=cuda"), "--out", str(out)]) == 0
    warning = "warning: a micro-batch of 4 rows does not fit the device's memory: limited to 2 for the rest"
    assert failed == [0] and capsys.readouterr().err.count(warning) == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["memory/micro_batch_rows"] for line in lines] == [2, 2]
    for ours, theirs in zip(metrics(out), metrics(run), strict=True):
        check_near(ours, theirs)
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (out, run))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-6


def test_an_update_of_which_no_row_fits_is_refused(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        simulated_card() as card,
        card.out_of_memory(update_module, "forward_backward", calls=ALWAYS, after=300) as failed,
    ):
        overrides = ("train.steps=1", "evaluate.before_and_after={}", "model.device=cuda")
        assert train([*small(cases, *overrides), "--out", str(tmp_path / "run")]) == 2
    assert failed == [0, 1, 2]
    check_refusal(capsys.readouterr().err)


def check_refusal(text: str) -> None:
    """Expect a single clear line about memory, and no traceback."""
    assert text.count("error:") == 1 and "Traceback" not in text
    assert "memory" in text[text.index("error:") :]


def test_a_rollout_that_does_not_fit_keeps_the_steps_before(
    run: Path, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    overrides = ("train.steps=2", "checkpoint.every=100", "model.device=cuda", "evaluate.before_and_after={}")
    argv = [*small(cases, *overrides), "--out", str(out)]
    with simulated_card() as card:
        with card.out_of_memory(train_module, "sample_groups", calls=(1,), after=50) as failed:
            assert train(argv) == 2
        assert failed == [1] and (out / "checkpoints" / "step_000001").is_dir()
        check_refusal(capsys.readouterr().err)
        assert train([*argv, "--resume"]) == 0
    assert (metrics(out), adapter(out)) == (metrics(run), adapter(run))


def test_an_evaluation_that_does_not_fit_keeps_the_steps_before(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = (
        "evaluate.before_and_after={}",
        f'evaluate.periodic={{ test = "{cases / "test.jsonl"}" }}',
        "evaluate.every=1",
    )
    argv = small(cases, "train.steps=2", "checkpoint.every=100", "model.device=cuda", *sets)
    with simulated_card() as card, card.out_of_memory(during_training, "evaluate", calls=(1,), after=50) as failed:
        assert train([*argv, "--out", str(tmp_path / "run")]) == 2
    assert failed == [1] and (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    check_refusal(capsys.readouterr().err)


def test_a_base_that_does_not_fit_leaves_no_run(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*small(cases, "train.steps=1", "model.device=cuda"), "--out", str(tmp_path / "run")]
    with simulated_card() as card, card.out_of_memory(policy_module, "load_base", after=20):
        assert train(argv) == 2
    check_refusal(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "triage", "replay"])
def test_commands_that_do_not_fit_are_refused(
    run: Path, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    device = "model.device=cuda:1"
    main, argv, owner, name = {
        "evaluate": (evaluate, [*small(cases, device), "--out", str(tmp_path / "eval")], sampling_module, "draw"),
        "triage": (triage, ["chest pain, 120/58", "--device", "cuda:1"], sampling_module, "draw"),
        "replay": (replay, [str(run), "--model"], update_module, "micro_batch_logprobs"),
    }[command]
    with simulated_card(index=1, cards=2) as card, card.out_of_memory(owner, name) as failed:
        assert main(argv) == 2
    assert failed == [0]
    check_refusal(capsys.readouterr().err)
