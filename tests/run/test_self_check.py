"""Every piece broken on purpose, and what the self-check makes of it. On a CPU: "Triton" is a copy of the plain ops,
"fla" a copy of the plain scan, and a "graph" the step's operations as make_fx records them;
tests/support/fused_pieces.py runs the check over the real Triton kernels in Triton's interpreter, and tests/test_gpu.py
on a card."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.qwen3_5 import modeling_qwen3_5

from grpo import train as train_module
from grpo.commands.evaluate import main as evaluate_main
from grpo.commands.triage import main as triage_main
from grpo.config import LoraSection, ModelSection
from grpo.policy import optional_kernels
from grpo.policy.policy import Kernels, Policy, load_policy
from grpo.qwen3_5 import decode
from grpo.qwen3_5 import decode_ops as plain
from grpo.qwen3_5 import gated_delta_scan as gated_delta
from grpo.qwen3_5 import train_forward as shared_prefix
from grpo.run import self_check as module
from grpo.run.self_check import DRIFT_BAND, DriftWarning, SelfCheck, check_on_cuda, self_check
from grpo.run.setup import Setup, with_check
from grpo.runtime.errors import UserError
from tests.conftest import TARGETS
from tests.engine.test_engines import buffers
from tests.test_train import lines, run, without_cost
from tests.test_train import world as world

OPS = ("norm", "swiglu", "convolve", "remember", "attend")
DTYPES = ("float32", "bfloat16")
Op = Callable[..., Any]


# --- faults ----------------------------------------------------------------------------------------------------------


def scaled(op: Op) -> Op:
    return lambda *given: 0.7 * op(*given)


def not_a_number(op: Op) -> Op:
    def faulty(*given: Any) -> Tensor:
        out = op(*given).clone()
        out.view(-1)[-1] = float("nan")
        return out

    return faulty


def raising(op: Op) -> Op:
    def faulty(*given: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    return faulty


def blind_mask(op: Op) -> Op:
    """Attention that also sees the columns that are not written yet."""
    return lambda q, k, v, mixer, memory, state, *rest: op(
        q, k, v, mixer, memory, replace(state, unseen=torch.zeros_like(state.unseen)), *rest
    )


def short_mask(op: Op) -> Op:
    """Attention that does not see the first column."""

    def faulty(q: Tensor, k: Tensor, v: Tensor, mixer: Any, memory: Any, state: Any, *rest: Any) -> Any:
        unseen = state.unseen.clone()
        unseen[:, 0] = float("-inf")
        return op(q, k, v, mixer, memory, replace(state, unseen=unseen), *rest)

    return faulty


def stale_buffers(op: Op) -> Op:
    """A right output; what is written is lost."""
    return lambda memory, *rest: op(module.copy_buffers(memory), *rest)


def late_position(op: Op) -> Op:
    """Queries and keys turned by the next position, which is also where they are written."""
    return lambda q, k, v, mixer, memory, state, *rest: op(
        q, k, v, mixer, memory, replace(state, positions=state.positions + 1), *rest
    )


OP_FAULTS = [
    *((op, fault) for op in OPS for fault in (scaled, not_a_number, raising)),
    *(("attend", fault) for fault in (blind_mask, short_mask, late_position)),
    *((op, stale_buffers) for op in ("convolve", "remember")),
]


def scaled_scan(scan: Op) -> Op:
    def faulty(*given: Any) -> tuple[Tensor, Tensor]:
        out, state = scan(*given)
        return 0.7 * out, state

    return faulty


def lost_state(scan: Op) -> Op:
    """Completions do not start from their prompts' states."""
    return lambda q, k, v, decay, beta, state: scan(q, k, v, decay, beta, None)


def scaled_gradient(scan: Op) -> Op:
    """A right output whose gradient is halved."""

    def faulty(*given: Any) -> tuple[Tensor, Tensor]:
        out, state = scan(*given)
        return 0.5 * out + 0.5 * out.detach(), state

    return faulty


def endless(scan: Op) -> Op:
    def faulty(*given: Any) -> tuple[Tensor, Tensor]:
        out, state = scan(*given)
        return out / 0.0, state

    return faulty


# --- a card in miniature ---------------------------------------------------------------------------------------------


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What a capture does, on a CPU: the operations of a step with the tensors they were given, and no effect yet."""
    held = buffers(step.__self__.state)  # type: ignore[attr-defined]
    before = [t.clone() for t in held]
    graph = make_fx(lambda: step())()
    logits = torch.empty_like(graph())
    for t, value in zip(held, before, strict=True):
        t.copy_(value)

    def replay() -> None:
        logits.copy_(graph())

    return replay, logits


def capture_raises(step: Callable[[], Tensor]) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


def replay_raises(step: Callable[[], Tensor]) -> Any:
    replay, logits = record(step)
    return raising(replay), logits


def stale_logits(step: Callable[[], Tensor]) -> Any:
    """Replays update the buffers; the logits stay those of the first."""
    replay, logits = record(step)
    shown: list[Tensor] = []

    def faulty() -> None:
        replay()
        shown.append(logits.clone())
        logits.copy_(shown[0])

    return faulty, logits


def stale_buffers_of_a_graph(step: Callable[[], Tensor]) -> Any:
    """Replays give logits and put the first of the buffers back."""
    held = buffers(step.__self__.state)[-1]  # type: ignore[attr-defined]
    replay, logits = record(step)

    def faulty() -> None:
        before = held.clone()
        replay()
        held.copy_(before)

    return faulty, logits


def loss_after_the_last_logits(step: Callable[[], Tensor]) -> Any:
    """The last replay's logits are right, and what it leaves in a buffer is not."""
    held = buffers(step.__self__.state)[-1]  # type: ignore[attr-defined]
    replay, logits = record(step)
    replays: list[int] = []

    def faulty() -> None:
        replay()
        replays.append(1)
        if len(replays) == module.STEPS - 1:
            held.zero_()

    return faulty, logits


def nan_replay(step: Callable[[], Tensor]) -> Any:
    replay, logits = record(step)

    def faulty() -> None:
        replay()
        logits[3, 5] = float("nan")

    return faulty, logits


GRAPH_FAULTS = (
    capture_raises,
    replay_raises,
    stale_logits,
    stale_buffers_of_a_graph,
    loss_after_the_last_logits,
    nan_replay,
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Triton's ops, graphs and fla's scan are there, on the CPU, and sound."""
    ops = SimpleNamespace(**{name: getattr(plain, name) for name in OPS})
    monkeypatch.setattr(decode, "pieces", lambda device: ops)
    monkeypatch.setattr(decode, "uses_graphs", lambda policy: policy.kernels.graphs)
    monkeypatch.setattr(decode, "capture", record)
    monkeypatch.setattr(shared_prefix, "uses_fla", lambda policy: policy.kernels.fla)
    monkeypatch.setitem(gated_delta.SCANS, "fla", gated_delta.chunked_scan)
    yield ops


@pytest.fixture(params=DTYPES)
def policy(request: pytest.FixtureRequest) -> Policy:
    """The embedded base: in a random one mixers matter so little that bfloat16's rounding hides their faults."""
    return load(request.param)


@cache
def load(dtype: Any, name: str = "embedded:base", **more: Any) -> Policy:
    model = ModelSection(name=name, device="cpu", dtype=dtype, gradient_checkpointing=False, **more)
    return load_policy(model, LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""), seed=1)


# --- the table -------------------------------------------------------------------------------------------------------


def test_sound_pieces_pass(policy: Policy, card: SimpleNamespace) -> None:
    check = self_check(policy)
    assert check.kernels == Kernels() and not check.warnings
    assert set(check.figures) == {"logprob", "gradient", "op", "triton", "graphs", "fla"}
    assert check.figures["op"] == 0.0, "the same function twice"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_random_base_passes(random_base: Path, dtype: str, card: SimpleNamespace) -> None:
    assert self_check(load(dtype, str(random_base))).kernels == Kernels()


def test_nothing_but_plain_pytorch_passes(policy: Policy) -> None:
    check = self_check(policy)
    assert check == SelfCheck(Kernels(), check.figures) and set(check.figures) == {"logprob", "gradient"}
    assert check_on_cuda(policy) is None, "no CUDA, nothing to choose"


@pytest.mark.parametrize(("name", "fault"), OP_FAULTS)
def test_a_triton_op_at_fault_gives_way_to_plain_torch(
    policy: Policy, card: SimpleNamespace, name: str, fault: Callable[[Op], Op]
) -> None:
    setattr(card, name, fault(getattr(plain, name)))
    check = self_check(policy)
    assert check.kernels == Kernels(triton=False)
    (line,) = check.warnings
    assert line.startswith("warning: using plain PyTorch: ") and "\n" not in line
    assert ("no kernel image" if fault is raising else f"the Triton op {name} differs") in line
    json.dumps(check.record(), allow_nan=False)


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_a_graph_at_fault_gives_way_to_eager_steps(
    policy: Policy, card: SimpleNamespace, fault: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "capture", fault)
    check = self_check(policy)
    assert check.kernels == Kernels(graphs=False)
    (line,) = check.warnings
    assert line.startswith("warning: using no CUDA graphs: ") and "\n" not in line


@pytest.mark.parametrize("fault", [scaled_scan, lost_state, scaled_gradient, endless, raising])
def test_fla_at_fault_gives_way_to_the_plain_scan(
    policy: Policy, card: SimpleNamespace, fault: Callable[[Op], Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gated_delta.SCANS, "fla", fault(gated_delta.chunked_scan))
    check = self_check(policy)
    assert check.kernels == Kernels(fla=False)
    (line,) = check.warnings
    assert line.startswith("warning: using no flash-linear-attention: ") and "\n" not in line


def test_fla_at_fault_in_transformers_layers_gives_way_too(
    policy: Policy, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fill the prompts' caches, and are what the plain gradient is compared with."""
    monkeypatch.setattr(optional_kernels, "has_fla", lambda: True)
    monkeypatch.setattr(optional_kernels, "_fla_in_layers", True)
    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def installed(*given: Any, **options: Any) -> Any:
        out, state = rule(*given, **options)
        return (0.7 * out if optional_kernels._layers_use_fla() else out), state

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", installed)
    check = self_check(policy)
    assert check.kernels == Kernels(fla=False) and len(check.warnings) == 1
    assert not optional_kernels._layers_use_fla()
    load.__wrapped__("float32")
    assert optional_kernels._layers_use_fla()
    load.__wrapped__("float32", kernels="plain")
    assert not optional_kernels._layers_use_fla()


@pytest.mark.parametrize(("name", "fault"), OP_FAULTS)
def test_plain_decoding_at_fault_stops(
    policy: Policy, name: str, fault: Callable[[Op], Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, name, fault(getattr(plain, name)))
    with pytest.raises(UserError, match=r"plain PyTorch: (a log-probability .* by .* \(limit|RuntimeError: no kernel)"):
        self_check(policy)


@pytest.mark.parametrize("fault", [scaled_scan, lost_state, endless, raising])
def test_a_forward_pass_at_fault_stops(
    policy: Policy, fault: Callable[[Op], Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gated_delta.SCANS, "plain", fault(gated_delta.chunked_scan))
    with pytest.raises(UserError, match="self-check in plain PyTorch: (a log-probability|RuntimeError)"):
        self_check(policy)


def without_input_gradient(linear: Op) -> Op:
    return lambda x, layers: linear(x.detach(), layers)


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(gated_delta.SCANS, "plain", scaled_gradient), (shared_prefix, "linear", without_input_gradient)],
)
def test_a_gradient_at_fault_stops(
    policy: Policy, where: Any, name: str, fault: Callable[[Op], Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    if where is gated_delta.SCANS:
        monkeypatch.setitem(where, name, fault(where[name]))
    else:
        monkeypatch.setattr(where, name, fault(getattr(where, name)))
    with pytest.raises(UserError, match="self-check in plain PyTorch: (the gradient of|RuntimeError)"):
        self_check(policy)


def test_several_faults_at_once(policy: Policy, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    card.swiglu = raising(plain.swiglu)
    monkeypatch.setattr(decode, "capture", capture_raises)
    monkeypatch.setitem(gated_delta.SCANS, "fla", raising(gated_delta.chunked_scan))
    check = self_check(policy)
    assert check.kernels == Kernels(triton=False, graphs=False, fla=False) and len(check.warnings) == 3


def test_out_of_memory_is_no_fault_of_a_kernel(policy: Policy, card: SimpleNamespace) -> None:
    def full(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card.norm = full
    with pytest.raises(torch.OutOfMemoryError):
        self_check(policy)


def test_kernels_that_the_config_switches_off_are_not_tried(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load("float32", kernels="plain")
    card.norm = raising(plain.norm)
    monkeypatch.setitem(gated_delta.SCANS, "fla", raising(gated_delta.chunked_scan))
    check = self_check(policy)
    assert check.kernels == Kernels(triton=False, graphs=True, fla=False) and not check.warnings
    assert set(check.figures) == {"logprob", "gradient", "graphs"}


# --- what follows ----------------------------------------------------------------------------------------------------


def test_the_policy_is_left_as_it_was(policy: Policy, card: SimpleNamespace) -> None:
    parameters = policy.adapter_parameters()
    next(iter(parameters.values())).grad = torch.ones_like(next(iter(parameters.values())))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    random = torch.get_rng_state()
    card.attend = raising(plain.attend)
    assert self_check(policy).warnings
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())
    assert not policy.model.training
    assert torch.equal(torch.get_rng_state(), random)
    first, *others = parameters.values()
    assert first.grad is not None and bool((first.grad == 1).all()) and all(p.grad is None for p in others)
    assert list(policy.adapter_parameters()) == list(parameters)
    first.grad = None  # the policy is shared


def test_a_run_with_the_check_is_the_run_without(
    world: list[str], tmp_path: Path, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits of a step, and the choice and its figures in config.json."""
    short = ("--set", "train.steps=1", "--set", "evaluate.before_and_after={}", "--set", "evaluate.periodic={}")
    monkeypatch.setattr(decode, "uses_graphs", lambda policy: False)
    assert run(world, tmp_path / "without", *short) == 0
    card.norm = raising(plain.norm)
    monkeypatch.setattr(train_module, "check_on_cuda", self_check)
    assert run(world, tmp_path / "with", *short) == 0
    without, checked = (lines(tmp_path / name / "metrics.jsonl") for name in ("without", "with"))
    assert without_cost(without) == without_cost(checked)
    records = [json.loads((tmp_path / name / "config.json").read_text())["kernels"] for name in ("without", "with")]
    assert records[0] is None
    assert (records[1]["triton"], records[1]["graphs"], records[1]["fla"]) == (False, True, True)
    assert records[1]["differences"]["op"] is None and records[1]["differences"]["logprob"] < 1e-4
    assert "no kernel image" in records[1]["warnings"][0]


def test_a_check_that_fails_stops_the_run_before_it_begins(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "swiglu", scaled(plain.swiglu))
    monkeypatch.setattr(train_module, "check_on_cuda", self_check)
    assert run(world, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "error: self-check in plain PyTorch: a log-probability" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_all_ranks_take_the_kernels_that_pass_on_each(make_policy: Callable[..., Policy]) -> None:
    ranks: Any = SimpleNamespace(all_gather_object=lambda value: [value, value | {"graphs": False}])
    check = SelfCheck(Kernels(triton=False), {"op": 1.0}, ("a line",))
    unused: dict[str, Any] = {field.name: None for field in fields(Setup)}
    setup = with_check(Setup(**unused | {"policy": replace(make_policy(), world=ranks)}), check)
    assert setup.policy.kernels == Kernels(False, False, True)
    assert setup.check == replace(check, kernels=setup.policy.kernels)


# --- drift -----------------------------------------------------------------------------------------------------------


def test_the_largest_difference_is_logged_and_warned_of_once(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check, with one decode op scaled by 0.7."""
    short = ("--set", "train.steps=2", "--set", "evaluate.before_and_after={}", "--set", "evaluate.periodic={}")
    assert run(world, tmp_path / "sound", *short) == 0
    assert "warning: step" not in capsys.readouterr().err
    monkeypatch.setattr(plain, "attend", scaled(plain.attend))
    assert run(world, tmp_path / "faulty", *short) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: step" in line]
    assert len(warnings) == 1 and "warning: step 1: the difference between sampler and trainer" in warnings[0]
    sound, faulty = (lines(tmp_path / name / "metrics.jsonl") for name in ("sound", "faulty"))
    for record in sound:
        assert record["sampler/abs_logprob_diff"] < record["sampler/max_abs_logprob_diff"] < 1e-4
    assert all(record["sampler/abs_logprob_diff"] < 1e-4 for record in faulty), "the mean hardly shows it"
    assert all(record["sampler/max_abs_logprob_diff"] > DRIFT_BAND[torch.float32] for record in faulty)


@pytest.mark.parametrize("largest", [0.51, None])
def test_the_band_is_the_dtypes(largest: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    drift = DriftWarning(torch.bfloat16, temperature=1.0)
    drift.warn_once(1, 0.49)
    assert not capsys.readouterr().err
    drift.warn_once(2, largest), drift.warn_once(3, largest)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: step 2: ") and "bfloat16 explains at most 0.5" in line
    DriftWarning(torch.bfloat16, temperature=0.5).warn_once(1, 0.9)
    assert not capsys.readouterr().err, "logits divided by 0.5 differ by twice as much"


# --- where it is run --------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_decoded_is_seen_though_it_is_fresh(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B is 0 in a fresh adapter: the check gives it other values while it looks."""
    add = decode._add
    monkeypatch.setattr(decode, "_add", lambda x, h, layer: add(x, h, replace(layer, adapter=None)))
    with pytest.raises(UserError, match="a log-probability of the plain decode step differs"):
        self_check(policy)


def test_a_card_takes_what_is_chosen_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace()
    monkeypatch.setattr(decode, "pieces", lambda device: ops)
    monkeypatch.setattr(shared_prefix, "has_fla", lambda: True)
    on_card = replace(load("float32"), device=torch.device("cuda:0"))
    without = replace(on_card, kernels=Kernels(triton=False, graphs=False, fla=False))
    assert decode.ops_of(on_card) is ops and decode.ops_of(without) is plain
    assert decode.uses_graphs(on_card) and not decode.uses_graphs(without)
    assert shared_prefix.uses_fla(on_card) and not shared_prefix.uses_fla(without)
    assert not decode.uses_graphs(load("float32")) and not shared_prefix.uses_fla(load("float32"))


def test_on_a_card_the_check_is_run_and_its_lines_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = SelfCheck(Kernels(graphs=False), {"graphs": 1.0}, ("warning: using no CUDA graphs: a reason",))
    monkeypatch.setattr(module, "self_check", lambda policy: check)
    on_card = replace(load("float32"), device=torch.device("cuda:0"))
    assert check_on_cuda(on_card) == check and module.with_checked_kernels(on_card).kernels == check.kernels
    assert capsys.readouterr().err == "warning: using no CUDA graphs: a reason\n" * 2


@pytest.mark.parametrize("command", ["evaluate", "triage"])
def test_commands_that_answer_decode_with_what_passed(
    command: str, card: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op that raises would end them."""
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"id": "a", "text": "A 34-year-old male, chest pain.", "esi": 2}\n', encoding="utf-8")
    options: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "evaluate": (evaluate_main, ["configs/tiny.toml", "--cases", str(cases), "--out", str(tmp_path / "out")]),
        "triage": (triage_main, ["A 34-year-old male, chest pain."]),
    }
    main, arguments = options[command]
    monkeypatch.setattr(decode, "uses_graphs", lambda policy: False)
    card.norm = raising(plain.norm)
    with pytest.raises(RuntimeError, match="no kernel image"):
        main([*arguments, "--max-new-tokens", "3"])
    monkeypatch.setattr(module, "check_on_cuda", self_check)
    assert main([*arguments, "--max-new-tokens", "3"]) in (0, 1)
