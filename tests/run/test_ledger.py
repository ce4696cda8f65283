"""The ledger: what is read is what was written, no text where texts are kept out, every changed byte is named."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from grpo.metrics import advantage_by_component, compute_token_terms, step_metrics
from grpo.run import ledger as ledger_module
from grpo.run.ledger import TENSOR_SPECS, read_step, recorded_steps, step_files, truncate_ledger, write_step
from grpo.runtime.atomic_files import DiskError
from grpo.runtime.errors import UserError
from grpo.types import ReplacedGroup, StepRecord
from tests.test_metrics import config_with, make_step

DROPPED = (ReplacedGroup("c9", (1, 2, 3), (True, True, True), (0.1, 0.1, 0.1)),)


def write(folder: Path, step: StepRecord, *overrides: str, text: str = "full") -> dict[str, object]:
    config = config_with(*overrides)
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    shares = advantage_by_component(step, config.advantage)
    record = step_metrics(step, account, shares, config)
    write_step(folder, step, account, shares, record, text=text)
    return record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path / "ledger",
        make_step(config_with(), epochs=2, dropped=DROPPED),
    )
    return tmp_path / "ledger"


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    step = make_step(config_with(), epochs=2, dropped=DROPPED)
    entry = read_step(folder, 3)
    assert recorded_steps(folder) == (3,) and entry.modified_files == () and entry.text == "full"
    again = entry.step
    # sampled log-probabilities pass through float32, as they do in the batch
    drawn = lambda s: [torch.tensor(c.sampler_logprobs) for g in s.groups for c in g.completions]  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(drawn(again), drawn(step), strict=True))
    for mine, read in zip(step.groups, again.groups, strict=True):
        assert read.prompt == mine.prompt
        assert [(c.ids, c.finished, c.text) for c in read.completions] == [
            (c.ids, c.finished, c.text) for c in mine.completions
        ]
    assert again.scores == step.scores and again.replaced_groups == step.replaced_groups
    for name in ("completion_mask", "sampler_logprobs", "baseline_mask", "advantages", "token_weights"):
        assert torch.equal(getattr(again.batch, name), getattr(step.batch, name)), name
    assert torch.equal(again.logprobs.logprobs, step.logprobs.logprobs)
    config = config_with()
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    assert torch.equal(entry.account.loss, account.loss) and torch.equal(entry.account.clip_side, account.clip_side)
    assert entry.metrics == step_metrics(again, account, advantage_by_component(again, config.advantage), config)
    assert math.fsum(entry.account.loss[0].tolist()) == entry.metrics["loss"]
    assert np.array_equal(entry.advantages.flatten(), step.batch.advantages.numpy())


def test_the_tensors_are_those_of_the_table(folder: Path) -> None:
    with safe_open(step_files(folder, 3)[0], "pt") as file:
        assert set(file.keys()) == set(TENSOR_SPECS)


@pytest.mark.parametrize("text", ["redacted", "off"])
def test_no_word_is_written_where_texts_are_kept_out(tmp_path: Path, text: str) -> None:
    step = make_step(config_with())
    write(tmp_path, step, text=text)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for word in (b"40-year-old", b"ANSWER", *([b'"c0"', b'"c1"'] if text == "off" else [])):
        assert word not in written
    with safe_open(step_files(tmp_path, 3)[0], "pt") as file:
        assert not {"prompt_ids", "completion_ids"} & set(file.keys()), "ids are text to whoever has the tokenizer"
    entry = read_step(tmp_path, 3)
    assert entry.text == text and entry.modified_files == ()
    assert [len(c.ids) for g in entry.step.groups for c in g.completions] == [3, 1, 4, 2, 4, 4]
    assert entry.step.scores[0][1].parts == step.scores[0][1].parts
    assert entry.step.groups[0].prompt.case.id == ("c0" if text == "redacted" else "")


def test_a_change_in_any_tensor_is_seen(folder: Path) -> None:
    file = step_files(folder, 3)[0]
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for name in TENSOR_SPECS:
        begin = 8 + size + header[name]["data_offsets"][0]
        file.write_bytes(whole[:begin] + bytes([whole[begin] ^ 1]) + whole[begin + 1 :])
        try:
            changed = read_step(folder, 3).modified_files
        except UserError as error:
            assert "changed since they were written: ledger/step_000003.safetensors" in str(error)
        else:
            assert changed == ("ledger/step_000003.safetensors",)


def test_a_changed_line_is_named(folder: Path) -> None:
    file = step_files(folder, 3)[1]
    file.write_text(file.read_text().replace("ANSWER: ESI 2", "ANSWER: ESI 3", 1))
    assert read_step(folder, 3).modified_files == ("ledger/step_000003.jsonl",)


def test_a_step_is_in_the_index_only_when_its_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(config_with())
    write(tmp_path, StepRecord(1, *(getattr(step, n) for n in StepRecord.__slots__[1:])))
    for refused in ("write_atomic", "append_line_synced"):
        with monkeypatch.context() as patch:

            def full(path: Path, content: object) -> None:
                raise DiskError(path, "No space left on device")

            patch.setattr(ledger_module, refused, full)
            with pytest.raises(DiskError):
                write(tmp_path, StepRecord(2, *(getattr(step, n) for n in StepRecord.__slots__[1:])))
        assert recorded_steps(tmp_path) == (1,) and read_step(tmp_path, 1).modified_files == ()


def test_a_resumed_run_takes_the_steps_after_its_checkpoint_out(tmp_path: Path) -> None:
    step = make_step(config_with())
    for number in (1, 2, 3):
        write(tmp_path, StepRecord(number, *(getattr(step, n) for n in StepRecord.__slots__[1:])))
    (tmp_path / ".step_000004.partial").write_bytes(b"torn")
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('{"step": 4, "fi')
    assert recorded_steps(tmp_path) == (1, 2, 3), "a line torn by a crash is no step"
    truncate_ledger(tmp_path, step=2)
    assert recorded_steps(tmp_path) == (1, 2)
    assert {p.name for p in tmp_path.iterdir()} == {
        "index.jsonl", "step_000001.jsonl", "step_000001.safetensors", "step_000002.jsonl", "step_000002.safetensors",
    }  # fmt: skip
    truncate_ledger(tmp_path / "nowhere", step=2)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("index.jsonl", b'{"step": 3}\n', "index.jsonl:1: not a line of a ledger's index"),
        ("index.jsonl", b"\xff\xfe\n", "index.jsonl:1: not a line of a ledger's index"),
        ("step_000003.jsonl", b"", "the first line of the JSONL file is not that of step 3"),
        ("step_000003.jsonl", b"{}\n", "step_000003.jsonl:1: not a line of a ledger"),
        ("step_000003.jsonl", b"[" * 100_000 + b"\n", "step_000003.jsonl:1: not a line of a ledger"),
        ("step_000003.jsonl", b'{"kind": "step", "step": 3}\n', "step_000003.jsonl:1: not a line of a ledger"),
        ("step_000003.safetensors", b"torn", "step_000003.safetensors: cannot be read"),
        ("step_000003.safetensors", (2**60).to_bytes(8, "little"), "step_000003.safetensors: cannot be read"),
    ],
)
def test_a_broken_ledger_is_one_error_that_names_the_file(folder: Path, name: str, content: bytes, says: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_step(folder, 3)
    assert says in str(error.value) and str(folder) in str(error.value)
    assert "40-year-old" not in str(error.value)


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step 7 in this ledger: it has steps 3 to 3"):
        read_step(folder, 7)
    with pytest.raises(UserError, match="no ledger in this run"):
        recorded_steps(tmp_path / "nothing")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no ledger in this run"):
        read_step(folder, 3)
