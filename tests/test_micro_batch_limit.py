"""Micro-batches: what fits, what is skipped, and what happens when the device says no."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grpo.policy.base_model
import grpo.update
from grpo import micro_batch_limit as memory
from grpo.forward import FORWARDS
from grpo.micro_batch_limit import Room, kept_bytes, room
from grpo.policy.base_model import load_base
from grpo.policy.policy import Policy
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.free_memory import card_free, free_bytes, group_rooms, host_available
from grpo.types import Batch
from grpo.update import MicroBatch, OutOfMemory, fitting, micro_batches, update_policy
from tests.test_update import batch_of, close, config_with, gradients


def with_lengths(batch: Batch, lengths: list[int]) -> Batch:
    """Two prompts of 10 and 20 tokens, answered in turn by completions of these lengths."""
    prompts = [(1,) * 10, (2,) * 20]
    return replace(
        batch,
        prompt_ids=tuple(prompts[i % 2] for i in range(len(lengths))),
        completion_ids=tuple((7,) * n for n in lengths),
        advantages=torch.arange(len(lengths), dtype=torch.float64) % 3,
        token_weights=(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float(),
    )


@pytest.fixture
def batch(make_policy: Callable[..., Policy]) -> Batch:
    return with_lengths(batch_of(make_policy(), config_with()), [5, 6, 7, 8, 9, 10])


def rows_of(cuts: tuple[MicroBatch, ...]) -> list[list[int]]:
    return [cut.rows.tolist() for cut in cuts]


def test_tokens_are_counted_with_each_prompt_once(batch: Batch) -> None:
    assert Room(9, 35, True).size(batch, [1, 3, 5]) == 20 + 6 + 8 + 10
    assert Room(9, 35, False).size(batch, [1, 3, 5]) == 3 * 30
    assert rows_of(micro_batches(batch, Room(9, 44, True), beta=1.0)) == [[5, 3, 1], [4, 2, 0]]
    assert rows_of(micro_batches(batch, Room(9, 43, True), beta=1.0)) == [[5, 3], [1], [4, 2, 0]]
    assert rows_of(micro_batches(batch, Room(9, 60, False), beta=1.0)) == [[5, 3], [1, 4], [2, 0]]
    assert rows_of(micro_batches(batch, Room(2, None, True), beta=1.0)) == [[5, 3], [1, 4], [2, 0]]


def test_a_row_that_is_too_long_stands_alone(batch: Batch) -> None:
    assert rows_of(micro_batches(batch, Room(9, 1, True), beta=1.0)) == [[5], [3], [1], [4], [2], [0]]


def test_rows_without_signal_come_last_unless_the_kl_moves_them(batch: Batch) -> None:
    cuts = micro_batches(batch, Room(9, None, True), beta=0.0)
    assert [(cut.rows.tolist(), cut.silent) for cut in cuts] == [([5, 1, 4, 2], False), ([3, 0], True)]
    assert not any(cut.silent for cut in micro_batches(batch, Room(9, None, True), beta=0.1))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rows_without_weight_are_silent_whatever_moves_the_others(batch: Batch, beta: float) -> None:
    batch.token_weights[[1, 5]] = 0
    cuts = micro_batches(batch, Room(9, None, True), beta=beta)
    assert [sorted(cut.rows.tolist()) for cut in cuts if cut.silent] == [[1, 5] if beta else [0, 1, 3, 5]]


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_masked_rows_cost_no_backward_and_change_nothing(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """Nor what is recorded of them."""
    policy, config = make_policy(), config_with(f"loss.beta={beta}", "optim.inner_epochs=2")
    batch = batch_of(policy, config)
    masked = [0, 5, 6, 10]
    weights = batch.token_weights.clone()
    weights[masked] = 0
    batch = replace(batch, token_weights=weights)
    trained: set[int] = set()
    plain = grpo.update.micro_batch_logprobs

    def watched(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        if torch.is_grad_enabled():
            trained.update(cut.rows.tolist())
        return plain(policy, batch, cut, temperature)

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", watched)
    done: list[Any] = []

    def keeping(*args: Any, **kwargs: Any) -> None:
        done.append(update_policy(*args, **kwargs))

    skipped = gradients(policy, batch, config, run=keeping)
    assert trained == set(range(12 if beta else 8)) - set(masked), "the third group has no advantage"
    monkeypatch.setattr(grpo.update, "micro_batches", lambda *_, **__: (MicroBatch(torch.arange(12)),))
    close(skipped, gradients(policy, batch, config, run=keeping))
    assert trained == set(range(12))
    silent, whole = (result.logprobs for result in done)
    for name in ("logprobs", "entropy", "ref_logprobs")[: 3 if beta else 2]:
        torch.testing.assert_close(getattr(silent, name), getattr(whole, name), atol=2e-5, rtol=1e-5)
    assert done[0].figures == pytest.approx(done[1].figures, rel=1e-5, abs=1e-7)


def test_silent_rows_cost_no_backward_and_change_nothing(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with("loss.beta=0.0")
    batch = batch_of(policy, config)
    assert [bool(a) for a in batch.advantages.view(3, 4).abs().sum(1)] == [True, True, False]
    recorded: list[tuple[int, bool]] = []
    plain = grpo.update.micro_batch_logprobs

    def watched(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        recorded.append((len(cut.rows), torch.is_grad_enabled()))
        return plain(policy, batch, cut, temperature)

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", watched)
    skipped = gradients(policy, batch, config)
    assert recorded == [(8, True), (4, False)]
    monkeypatch.setattr(grpo.update, "micro_batches", lambda *_, **__: (MicroBatch(torch.arange(12)),))
    close(skipped, gradients(policy, batch, config))


def test_tokens_bound_the_micro_batch_and_not_the_gradient(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    whole, few, auto = (config_with(*o) for o in ([], ["optim.micro_batch_tokens=100"],
                                                  ['optim.micro_batch_tokens="auto"']))  # fmt: skip
    batch = batch_of(policy, whole)
    assert len(micro_batches(batch, room(policy, few.optim, batch), beta=0.1)) > 3
    close(gradients(policy, batch, whole), gradients(policy, batch, few))
    close(gradients(policy, batch, whole), gradients(policy, batch, auto))


def test_auto_follows_free_memory(make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = make_policy(), config_with('optim.micro_batch_tokens="auto"')
    batch = batch_of(policy, config)
    longest = max(len(p) + len(c) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True))
    assert free_bytes(policy.device) > 1 << 20
    tokens = []
    for free in (1 << 20, 1 << 30, 1 << 31):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        tokens.append(room(policy, config.optim, batch).tokens)
    assert tokens[0] == longest, "one row is always tried"
    assert tokens[2] - tokens[1] == pytest.approx(tokens[1], rel=0.02)


def test_what_is_kept_grows_with_the_row_and_holds_no_weights(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    short, long = (kept_bytes(policy, (1,) * n, (2,) * n) for n in (64, 128))
    assert 1.5 * short < long < 2.5 * short
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    assert kept_bytes(policy, (1,), (2,)) < weights


@pytest.mark.parametrize(("dropout", "name"), [(0.0, "shared"), (0.1, "modules")])
def test_what_is_measured_is_what_is_trained_through(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, dropout: float, name: str
) -> None:
    policy, config = make_policy(dropout=dropout), config_with()
    batch = batch_of(policy, config)
    plain, calls = FORWARDS[name], []

    def watched(*given: Any) -> Any:
        calls.append(len(given[1]))
        return plain(*given)

    monkeypatch.setitem(FORWARDS, name, watched)
    kept_bytes(policy, (1,) * 4, (2,) * 4)
    grpo.update.micro_batch_logprobs(policy, batch, MicroBatch(torch.arange(12)), 1.0)
    assert calls == [1, 12]


def test_what_checkpointing_saves_is_seen_on_every_path(make_policy: Callable[..., Policy]) -> None:
    for dropout in (0.0, 0.1):  # with dropout the modules are gone through
        plain, saving = (make_policy(dropout=dropout, checkpointing=c) for c in (False, True))
        kept = [kept_bytes(policy, (1,) * 64, (2,) * 64) for policy in (plain, saving)]
        assert kept[1] < 0.5 * kept[0] and not saving.model.training


def test_a_random_model_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.policy.base_model, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(UserError, match=r"needs 35,815,213,056 bytes for its weights; cpu has 1,073,741,824 free"):
        load_base("random:qwen3.5-9b", device=torch.device("cpu"), dtype=torch.float32)


def refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The device has no room for a backward pass the first so many times; the sizes of all that were tried."""
    tried: list[int] = []
    plain = grpo.update.micro_batch_logprobs

    def full(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        out = plain(policy, batch, cut, temperature)
        if torch.is_grad_enabled():
            tried.append(len(cut.rows))
            if len(tried) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", full)
    return tried


def test_out_of_memory_is_tried_once_more_with_half(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, config = make_policy(), config_with()
    batch = batch_of(policy, config)
    whole = gradients(policy, batch, config)
    tried = refuse(monkeypatch, 1)
    close(gradients(policy, batch, config), whole)
    assert tried == [12, 6, 6]
    assert "a micro-batch of 12 rows does not fit: once more with half" in capsys.readouterr().err


def test_a_pass_that_failed_midway_leaves_no_gradient_behind(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with("optim.micro_batch_size=6")
    batch = batch_of(policy, config)
    whole = gradients(policy, batch, config)
    plain, calls = grpo.update.micro_batch_logprobs, []

    def full(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        if torch.is_grad_enabled():
            calls.append(len(cut.rows))
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(policy, batch, cut, temperature)

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", full)
    close(gradients(policy, batch, config), whole)
    assert calls == [6, 6, 3, 3, 3, 3]


def test_twice_out_of_memory_names_the_keys(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with()
    batch = batch_of(policy, config)
    refuse(monkeypatch, 2)
    before = {name: p.clone() for name, p in policy.adapter_parameters().items()}
    with pytest.raises(OutOfMemory, match=r"6 rows .*optim.micro_batch_size or optim.micro_batch_tokens"):
        update_policy(policy, batch, config, torch.optim.AdamW(policy.adapter_parameters().values()), None, step=0)
    assert all(torch.equal(before[name], p) for name, p in policy.adapter_parameters().items())
    assert issubclass(OutOfMemory, INPUT_ERRORS)


def test_the_reference_is_tried_again_as_well(make_policy: Callable[..., Policy], batch: Batch) -> None:
    seen: list[int] = []

    def run(cuts: tuple[MicroBatch, ...]) -> int:
        seen.append(len(cuts))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5

    assert fitting(run, make_policy(), batch, config_with(), Room(4, None, True)) == 5
    assert seen == [2, 3]


@pytest.mark.parametrize(
    ("cgroup", "mount", "files", "rooms"),
    [
        ("0::/a/b\n", "", {"a/b": ("500", "300", 40), "a": ("max", "900", 0), "": ("1000", "700", 100)}, [240, 400]),
        ("0::/\n", "", {"": ("max", "900", 0)}, []),
        ("0::/../elsewhere\n", "", {"": ("800", "300", 0)}, [500]),
        ("5:cpu,memory:/x\n1:name=systemd:/y\n", "memory", {"x": ("500", "300", 40), "": (str(2**63), "1", 0)}, [240]),
        ("0::/a\n", "", {"a": ("what", "300", 0)}, []),
    ],
)
def test_a_control_group_leaves_what_it_has_left(
    cgroup: str, mount: str, files: dict[str, tuple[str, str, int]], rooms: list[int], tmp_path: Path
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    limit, used, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if mount
        else ("memory.max", "memory.current", "inactive_file")
    )
    for place, (most, now, files_cached) in files.items():
        group = tmp_path / "sys" / "fs" / "cgroup" / mount / place
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(most + "\n")
        (group / used).write_text(now + "\n")
        (group / "memory.stat").write_text(f"anon 5\n{cached} {files_cached}\n")
    assert list(group_rooms(tmp_path)) == rooms


def test_the_host_says_what_it_can_give(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemFree:  1 kB\nMemAvailable:  300 kB\n")
    assert host_available(tmp_path / "meminfo") == 300 * 1024
    assert list(group_rooms(tmp_path)) == [] and host_available(tmp_path / "none") > 1 << 20


def test_an_integrated_card_has_what_the_host_has_available(tmp_path: Path) -> None:
    """After a checkpoint of 18 GB was read: 2 GB free as CUDA reports them, 100 GB with the page cache."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 125000000 kB\nMemFree: 2000000 kB\nMemAvailable: 100000000 kB\n")
    asked: list[int] = []

    def reported() -> int:
        asked.append(1)
        return 2 << 30

    integrated, discrete = SimpleNamespace(is_integrated=1), SimpleNamespace(is_integrated=0)
    assert card_free(integrated, reported, tmp_path) == 100_000_000 * 1024 and not asked
    assert card_free(discrete, reported, tmp_path) == 2 << 30 and asked == [1]


def test_a_containers_limit_bounds_an_integrated_card_too(tmp_path: Path) -> None:
    for name, text in {
        "proc/meminfo": "MemAvailable: 100000000 kB\n",
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": str(8 << 30),
        "sys/fs/cgroup/box/memory.current": str(5 << 30),
        "sys/fs/cgroup/box/memory.stat": f"inactive_file {1 << 30}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert card_free(SimpleNamespace(is_integrated=1), lambda: 0, tmp_path) == 4 << 30


def test_torch_says_whether_a_card_is_integrated() -> None:
    """The attribute, as the bindings of this torch declare it: no card is needed to see it."""
    stubs = Path(torch.__file__).parent / "_C/__init__.pyi"
    body = stubs.read_text(encoding="utf-8").partition("class _CudaDeviceProperties")[2].partition("\nclass ")[0]
    assert "is_integrated" in body
