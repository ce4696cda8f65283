"""Checkpoints: what is loaded is what was saved, all else is recognised, and the only good one is never dropped."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.config import CheckpointSection
from grpo.policy.policy import Policy, copy_adapter
from grpo.run import checkpoint as checkpoint_module
from grpo.run.checkpoint import (
    CHECKPOINT_FILES,
    Progress,
    delete_old_checkpoints,
    find_damage,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from grpo.runtime.atomic_files import DiskError
from grpo.runtime.errors import UserError
from tests.support.faults import DAMAGES

EVERY = CheckpointSection(every=1, keep=2)


def adamw(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.01)


def move(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    for i, p in enumerate(policy.adapter_parameters().values()):
        p.grad = torch.full_like(p, 0.1 * (i + 1))
    optimizer.step()


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy()


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    """Two checkpoints, of step 1 and 2."""
    optimizer = adamw(policy)
    for step in (1, 2):
        move(policy, optimizer)
        save_checkpoint(tmp_path / "c", policy, optimizer, Progress(step, step), EVERY)
    return tmp_path / "c"


def steps(folder: Path) -> list[int]:
    assert all(path.name.startswith("step_") for path in folder.iterdir())
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def test_what_is_loaded_is_what_was_saved(policy: Policy, make_policy: Callable[..., Policy], folder: Path) -> None:
    optimizer, other = adamw(policy), make_policy(moved=False)
    mine = copy_adapter(policy)
    theirs = adamw(other)
    assert load_checkpoint(folder / "step_000002", other, theirs) == Progress(2, 2)
    assert all(torch.equal(p, mine[name]) for name, p in copy_adapter(other).items())
    assert load_checkpoint(folder / "step_000002", policy, optimizer) == Progress(2, 2)
    move(other, theirs)
    move(policy, optimizer)
    assert all(torch.equal(p, copy_adapter(policy)[name]) for name, p in copy_adapter(other).items())


def test_no_pickle_and_all_files_are_in_the_manifest(folder: Path) -> None:
    found = {str(p.relative_to(folder / "step_000002")) for p in (folder / "step_000002").rglob("*") if p.is_file()}
    assert found == {*CHECKPOINT_FILES, "manifest.json"}
    assert set(json.loads((folder / "step_000002" / "manifest.json").read_text())["files"]) == set(CHECKPOINT_FILES)
    for name in found:
        load_file(folder / "step_000002" / name) if name.endswith("s") else json.loads(
            (folder / "step_000002" / name).read_text()
        )


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", *CHECKPOINT_FILES])
def test_whatever_was_not_written_like_that_is_named_and_the_one_before_is_used(
    policy: Policy, folder: Path, name: str, how: str
) -> None:
    DAMAGES[how](folder / "step_000002" / name, random.Random(name))
    path, told = latest_checkpoint(folder)
    assert path == folder / "step_000001" and len(told) == 1
    assert told[0][0].name == "step_000002" and told[0][1].startswith(name)
    with pytest.raises(UserError, match=name):
        load_checkpoint(folder / "step_000002", policy, adamw(policy))


def test_every_flipped_bit_of_the_small_files_is_seen(folder: Path) -> None:
    path = folder / "step_000002"
    for name in ("state.json", "manifest.json"):
        content = (path / name).read_bytes()
        for bit in range(0, 8 * len(content), 1 if len(content) < 100 else 7):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(flipped)
            # a newline that became another blank in the manifest changes nothing that it says
            same = name == "manifest.json" and _parsed(bytes(flipped)) == json.loads(content)
            assert (find_damage(path) is None) == same, (name, bit)
        (path / name).write_bytes(content)
    assert find_damage(path) is None


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize(
    "manifest",
    ["", "null", "[]", '{"version": 1}', '{"version": 1, "files": 7}', '{"version": 2, "files": {}}', "[" * 100_000,
     '{"version": 1, "files": {"../../../etc/passwd": {}}}', '{"version": 1, "files": {"state.json": 1}}'],
)  # fmt: skip
def test_a_manifest_of_anything_is_no_more_than_damage(folder: Path, manifest: str) -> None:
    (folder / "step_000002" / "manifest.json").write_text(manifest)
    assert "manifest.json" in (find_damage(folder / "step_000002") or "")


def test_where_none_is_whole_nothing_is_guessed(folder: Path) -> None:
    for path in folder.iterdir():
        (path / "state.json").unlink()
    with pytest.raises(UserError, match="start again from step 0") as told:
        latest_checkpoint(folder)
    assert "step_000001: state.json" in str(told.value) and "step_000002: state.json" in str(told.value)
    assert latest_checkpoint(folder / "nowhere") == (None, ())


def test_a_whole_checkpoint_of_another_adapter_or_step_is_refused(
    policy: Policy, make_policy: Callable[..., Policy], folder: Path
) -> None:
    other = make_policy(r=2)
    with pytest.raises(UserError, match="has another shape"):
        load_checkpoint(folder / "step_000002", other, adamw(other))
    shutil.copytree(folder / "step_000001", folder / "step_000009")
    with pytest.raises(UserError, match=r"state\.json is of step 1"):
        load_checkpoint(folder / "step_000009", policy, adamw(policy))


def test_of_old_ones_the_last_asked_for_are_kept(policy: Policy, tmp_path: Path) -> None:
    optimizer = adamw(policy)
    kept = {}
    for step in (2, 3, 4, 6, 7, 8, 9):  # 3, 7 and 9 by a signal
        save_checkpoint(tmp_path, policy, optimizer, Progress(step), CheckpointSection(every=2, keep=2))
        kept[step] = steps(tmp_path)
    assert kept == {2: [2], 3: [2, 3], 4: [2, 4], 6: [4, 6], 7: [6, 7], 8: [6, 8], 9: [8, 9]}
    save_checkpoint(tmp_path, policy, optimizer, Progress(10), CheckpointSection(every=2, keep=1))
    assert steps(tmp_path) == [10]


def test_the_only_good_one_is_never_dropped(policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, one = adamw(policy), CheckpointSection(every=1, keep=1)
    (folder / "step_000002" / "state.json").unlink()
    shutil.copytree(folder / "step_000002", folder / "step_000007")  # a damaged one of later, as after a fallback
    save_checkpoint(folder, policy, optimizer, Progress(3), one)
    assert steps(folder) == [3, 7] and latest_checkpoint(folder)[0] == folder / "step_000003"

    true = checkpoint_module.atomic_folder

    @contextlib.contextmanager
    def lying(target: Path) -> Iterator[Path]:
        """A disk that keeps other bytes than it was given."""
        with true(target) as aside:
            yield aside
        os.truncate(target / "optimizer.safetensors", 10)

    monkeypatch.setattr(checkpoint_module, "atomic_folder", lying)
    with pytest.raises(UserError, match="right after it was written"):
        save_checkpoint(folder, policy, optimizer, Progress(4), one)
    assert latest_checkpoint(folder)[0] == folder / "step_000003"


def test_a_full_disk_leaves_the_good_ones_and_nothing_half_written(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for full in ("adapter", "optimizer.safetensors", "state.json", "manifest.json"):
        with monkeypatch.context() as patch:
            _refuse(patch, full)
            with pytest.raises(DiskError, match="No space left on device"):
                save_checkpoint(folder, policy, adamw(policy), Progress(3), EVERY)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before, full
        assert steps(folder) == [1, 2]


def _refuse(patch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    true = checkpoint_module.write_atomic
    if name == "adapter":
        patch.setattr(checkpoint_module, "save_adapter", full)
    elif name.endswith(".safetensors"):
        patch.setattr(checkpoint_module, "save_file", full)
    else:
        patch.setattr(checkpoint_module, "write_atomic", lambda p, c: full() if p.name == name else true(p, c))


def test_what_a_crash_left_half_written_or_half_dropped_is_cleared(policy: Policy, folder: Path) -> None:
    for name in (".step_000003.partial", ".step_000001.dropped", ".step_000002.replaced"):
        shutil.copytree(folder / "step_000001" / "adapter", folder / name)
    delete_old_checkpoints(folder, step=2, section=EVERY)
    assert steps(folder) == [1, 2]
    delete_old_checkpoints(folder / "nowhere", step=2, section=EVERY)


def test_a_file_where_checkpoints_should_be_is_refused(policy: Policy, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="expected a folder of checkpoints"):
        latest_checkpoint(tmp_path / "file")
    (folder / "step_000003").write_text("no folder")
    path, told = latest_checkpoint(folder)
    assert path == folder / "step_000002" and told == ((folder / "step_000003", "is not a folder"),)
