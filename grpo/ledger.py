"""What a step was, written down: one record a step, from which `grpo.replay` computes everything again.

runs/NAME/ledger/
    index.jsonl               a line a step: sha256 of its two files and of every tensor
    step_000001.safetensors   numbers: see `TENSORS`
    step_000001.jsonl         a line of kind "step" (the metrics), then one a group, then one a completion

With ``text = "redacted"`` no text and no token id is written, only lengths and sha256 of the texts; with "off" the
JSONL holds the line of the step alone.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from grpo.account import TokenAccount, rewards_of
from grpo.durable import append_line, make_folder, write_whole, writing
from grpo.types import Batch, Case, Completion, Dropped, Group, Prompt, Step, TokenRecord
from rewards import Answer, Fired, Score

LEDGER_VERSION = 2
FIGURES = ("loss/trained", "grad_norm", "skipped")
"""Metrics that only the training can compute: a step takes them over from the line of its metrics."""
TENSORS = {
    "groups": "[N] int32, the group of each row",
    "lengths": "[N] int32, tokens of each completion, end token included",
    "prompt_lengths": "[B] int32",
    "thinking": "[B] bool, the prompt ends inside an opened thought",
    "gold": "[B] uint8",
    "finished": "[N] bool",
    "predicted": "[N] uint8, 0 where no level was parsed",
    "components": "[K,N] fp64, the reward's parts in the order of the metadata's `components`",
    "rewards": "[N] fp64",
    "in_baseline": "[N] bool",
    "advantages": "[N] fp64",
    "shares": "[K,N] fp64, the parts of the advantage",
    "token_weights": "[N] fp32, of each token of the row in the loss",
    "prompt_ids": "[ΣP] int32, group after group (not when redacted or off)",
    "completion_ids": "[M] int32, row after row (not when redacted or off)",
    "sampler_logprobs": "[M] fp32 nats",
    "logprobs": "[E,M] fp32 nats, at the start of each inner epoch; row 0 is the old policy's",
    "ref_logprobs": "[M] fp32 nats (with beta > 0)",
    "entropy": "[M] fp32 nats",
    "ratio": "[E,M] fp64",
    "clip": "[E,M] int8, −1 low, +1 high",
    "kl": "[E,M] fp64 nats (with beta > 0)",
    "loss": "[E,M] fp64, each token's term; fsum over a row is that inner epoch's loss",
}
"""Tensors of a step's safetensors file. M = ΣL tokens, packed row after row."""


class LedgerError(ValueError):
    """A ledger that cannot be read. Names file and line, never a text."""


class LedgerChanged(LedgerError):
    """A step that cannot be read because its files are no longer those that were written, by sha256."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One step as it was read back."""

    step: Step
    account: TokenAccount
    advantages: np.ndarray
    """[B,G] fp64, as recorded; so are the next."""
    rewards: np.ndarray
    shares: dict[str, np.ndarray]
    metrics: dict[str, Any]
    text: str
    """The config's ``ledger.text`` that it was written with."""
    changed: tuple[str, ...]
    """Files and tensors that are not what was written, by sha256."""


def write_step(
    folder: Path,
    step: Step,
    account: TokenAccount,
    shares: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
    *,
    text: str,
) -> None:
    """Adds a step: both files, then its line of the index. What it returns from is on the disk.

    Args:
        text: "full", "redacted" or "off": see the module's head.

    Raises:
        DiskError: a file could not be written; no line of the index speaks of it.
    """
    make_folder(folder)
    tensors = {name: value.contiguous() for name, value in _tensors(step, account, shares, text).items()}
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"ledger": json.dumps({"version": LEDGER_VERSION, "step": step.number, "components": list(shares)})}
    lines = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in _lines(step, metrics, text))
    contents = dict(zip(step_files(folder, step.number), (save(tensors, metadata), lines.encode("utf-8")), strict=True))
    for file, content in contents.items():
        write_whole(file, content)
    entry = {
        "step": step.number,
        "files": {file.name: _sha256(content) for file, content in contents.items()},
        "tensors": {name: _tensor_sha256(tensor) for name, tensor in tensors.items()},
    }
    append_line(folder / "index.jsonl", json.dumps(entry))


def ledger_steps(folder: Path) -> tuple[int, ...]:
    """Numbers of the steps in a ledger, in order. Raises `LedgerError` where there is none or its index is broken."""
    return tuple(sorted(_index(folder)))


def read_step(folder: Path, number: int) -> Entry:
    """A step as it was written, every file and tensor held against the index.

    Raises:
        LedgerError: the step is not there, or a file cannot be read at all.
    """
    index = _index(folder)
    if number not in index:
        there = f"it holds {min(index)} to {max(index)}" if index else "it is empty"
        raise LedgerError(f"{folder}: no step {number} in this ledger: {there}")
    tensor_file, line_file = step_files(folder, number)
    changed = [f"ledger/{file.name}" for file in (tensor_file, line_file) if not _unchanged(file, index[number])]
    try:
        tensors, components = _read_tensors(tensor_file)
        before = index[number]["tensors"]
        names = [*before, *(name for name in tensors if name not in before)]
        changed += [
            f"ledger/{tensor_file.name}: {name}"
            for name in names
            if name not in tensors or _tensor_sha256(tensors[name]) != before.get(name)
        ]
        return _entry(_read_lines(line_file), number, tensors, components, tuple(changed))
    except (LedgerError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        what = error if isinstance(error, LedgerError) else f"{folder}: the files of step {number} do not fit together"
        since = f" (changed since they were written: {', '.join(changed)})" if changed else ""
        raise (LedgerChanged if changed else LedgerError)(f"{what}{since}") from None


def cut_ledger(folder: Path, *, step: int) -> tuple[int, ...]:
    """Takes out every step after ``step``: what a resumed run will do again. Returns the numbers of those that stay."""
    if not folder.is_dir():
        return ()
    index = folder / "index.jsonl"
    lines = index.read_bytes().decode("utf-8", "replace").splitlines() if index.is_file() else []
    kept = {number: line for line in lines if (number := _number(line)) is not None and number <= step}
    write_whole(index, "".join(line + "\n" for line in kept.values()))
    for path in folder.iterdir():
        found = re.fullmatch(r"\.?step_(\d{6,})\..*", path.name)
        if found and (int(found[1]) > step or path.suffix == ".partial"):
            with writing(path):
                path.unlink()
    return tuple(kept)


def step_files(folder: Path, number: int) -> tuple[Path, Path]:
    """The tensors and the lines of a step."""
    return folder / f"step_{number:06d}.safetensors", folder / f"step_{number:06d}.jsonl"


def _tensors(step: Step, account: TokenAccount, shares: Mapping[str, np.ndarray], text: str) -> dict[str, Tensor]:
    batch, tokens = step.batch, step.tokens
    completions = [completion for group in step.groups for completion in group.completions]
    scores = [score for row in step.scores for score in row]
    tensors = {
        "groups": torch.tensor([b for b, g in enumerate(step.groups) for _ in g.completions], dtype=torch.int32),
        "lengths": torch.tensor([len(c.ids) for c in completions], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(group.prompt.ids) for group in step.groups], dtype=torch.int32),
        "thinking": torch.tensor([group.prompt.thinking for group in step.groups]),
        "gold": torch.tensor([group.prompt.case.esi for group in step.groups], dtype=torch.uint8),
        "finished": torch.tensor([c.finished for c in completions]),
        "predicted": torch.tensor([score.answer.level or 0 for score in scores], dtype=torch.uint8),
        "components": torch.tensor([list(score.parts.values()) for score in scores], dtype=torch.float64).T,
        "rewards": torch.from_numpy(rewards_of(step).flatten()),
        "in_baseline": batch.in_baseline,
        "advantages": batch.advantages,
        "shares": torch.from_numpy(np.stack([share.flatten() for share in shares.values()])),
        "token_weights": batch.token_weights[:, 0],
        "sampler_logprobs": batch.sampler_logprobs[batch.completion_mask],
        "logprobs": tokens.logprobs,
        "entropy": tokens.entropy,
        "ratio": account.ratio,
        "clip": account.clip,
        "loss": account.loss,
    }
    if tokens.ref_logprobs is not None and account.kl is not None:
        tensors |= {"ref_logprobs": tokens.ref_logprobs, "kl": account.kl}
    if text == "full":
        tensors["prompt_ids"] = torch.tensor([i for group in step.groups for i in group.prompt.ids], dtype=torch.int32)
        tensors["completion_ids"] = torch.tensor([i for c in completions for i in c.ids], dtype=torch.int32)
    return tensors


def _lines(step: Step, metrics: Mapping[str, Any], text: str) -> Iterator[dict[str, Any]]:
    dropped = [asdict(one) for one in step.dropped]
    if text == "off":
        dropped = [one | {"case_id": ""} for one in dropped]
    yield {"kind": "step", "step": step.number, "text": text, "metrics": dict(metrics), "dropped": dropped}
    if text == "off":
        return
    shown = _whole if text == "full" else _hashed
    for b, group in enumerate(step.groups):
        case = group.prompt.case
        yield {"kind": "group", "group": b, "case": case.id, "tags": list(case.tags), **shown(case.text)}
    for b, (group, row) in enumerate(zip(step.groups, step.scores, strict=True)):
        for g, (completion, score) in enumerate(zip(group.completions, row, strict=True)):
            yield {
                "kind": "completion",
                "group": b,
                "member": g,
                "reason": score.answer.reason,
                "span": score.answer.span,
                "fired": [asdict(fired) for fired in score.fired],
                "timed_out": score.timed_out,
                **shown(completion.text),
            }


def _whole(text: str) -> dict[str, Any]:
    return {"content": text}


def _hashed(text: str) -> dict[str, Any]:
    return {"sha256": _sha256(text.encode("utf-8", "surrogatepass")), "characters": len(text)}


def _entry(
    lines: list[dict[str, Any]],
    number: int,
    tensors: Mapping[str, Tensor],
    components: list[str],
    changed: tuple[str, ...],
) -> Entry:
    head = lines[0]
    if head["kind"] != "step" or head["step"] != number:
        raise ValueError("another step's line")
    groups, scores = _groups(tensors, components, lines[1:])
    shape = (len(groups), len(groups[0].completions))
    mask = torch.arange(int(tensors["lengths"].max())) < tensors["lengths"][:, None]
    sampler = torch.zeros(mask.shape)
    sampler[mask] = tensors["sampler_logprobs"]
    batch = Batch(
        prompt_ids=tuple(group.prompt.ids for group in groups for _ in group.completions),
        completion_ids=tuple(completion.ids for group in groups for completion in group.completions),
        completion_mask=mask,
        sampler_logprobs=sampler,
        in_baseline=tensors["in_baseline"],
        advantages=tensors["advantages"],
        token_weights=torch.where(mask, tensors["token_weights"][:, None], 0.0),
    )
    record = TokenRecord(tensors["logprobs"], tensors.get("ref_logprobs"), tensors["entropy"])
    dropped = tuple(
        Dropped(d["case_id"], tuple(d["lengths"]), tuple(d["finished"]), tuple(d["rewards"])) for d in head["dropped"]
    )
    metrics = head["metrics"]
    return Entry(
        step=Step(number, groups, scores, batch, record, dropped, *(metrics[name] for name in FIGURES)),
        account=TokenAccount(tensors["ratio"], tensors["clip"], tensors.get("kl"), tensors["loss"]),
        advantages=tensors["advantages"].numpy().reshape(shape),
        rewards=tensors["rewards"].numpy().reshape(shape),
        shares={name: share.numpy().reshape(shape) for name, share in zip(components, tensors["shares"], strict=True)},
        metrics=metrics,
        text=head["text"],
        changed=changed,
    )


def _groups(
    tensors: Mapping[str, Tensor], components: list[str], lines: list[dict[str, Any]]
) -> tuple[tuple[Group, ...], tuple[tuple[Score, ...], ...]]:
    """Groups and scores as they were. Where texts were not written, texts are empty and ids are zeros."""
    said = {(line["group"], line.get("member")): line for line in lines}
    lengths, sampler = tensors["lengths"].tolist(), tensors["sampler_logprobs"].tolist()
    ids = tensors["completion_ids"].tolist() if "completion_ids" in tensors else [0] * len(sampler)
    prompt_lengths = tensors["prompt_lengths"].tolist()
    prompt_ids = tensors["prompt_ids"].tolist() if "prompt_ids" in tensors else [0] * sum(prompt_lengths)
    if len(sampler) != sum(lengths) or len(ids) != sum(lengths) or len(prompt_ids) != sum(prompt_lengths):
        raise ValueError("token counts disagree")
    owners, predicted, finished = (tensors[name].tolist() for name in ("groups", "predicted", "finished"))
    parts, totals = tensors["components"].T.tolist(), tensors["rewards"].tolist()
    groups, scores = [], []
    row, at, prompt_at = 0, 0, 0
    for b, (gold, thinking, width) in enumerate(
        zip(tensors["gold"].tolist(), tensors["thinking"].tolist(), prompt_lengths, strict=True)
    ):
        head = said.get((b, None), {})
        case = Case(head.get("case", ""), head.get("content", ""), gold, tuple(head.get("tags", ())))
        prompt = Prompt(case, tuple(prompt_ids[prompt_at : prompt_at + width]), thinking)
        prompt_at += width
        completions, row_scores = [], []
        for member in range(owners.count(b)):
            line, stop = said.get((b, member), {}), at + lengths[row]
            completions.append(
                Completion(tuple(ids[at:stop]), tuple(sampler[at:stop]), finished[row], line.get("content", ""))
            )
            row_scores.append(_score(line, dict(zip(components, parts[row], strict=True)), totals[row], predicted[row]))
            row, at = row + 1, stop
        groups.append(Group(prompt, tuple(completions)))
        scores.append(tuple(row_scores))
    return tuple(groups), tuple(scores)


def _score(line: Mapping[str, Any], parts: dict[str, float], total: float, predicted: int) -> Score:
    span = line.get("span")
    reason = line.get("reason", "parsed" if predicted else "no answer")
    return Score(
        total=total,
        parts=parts,
        answer=Answer(predicted or None, reason, tuple(span) if span else None),
        fired=tuple(
            Fired(fired["rule"], tuple(fired["span"]) if fired["span"] else None, fired["value"])
            for fired in line.get("fired", ())
        ),
        timed_out=line.get("timed_out", False),
    )


def _index(folder: Path) -> dict[int, dict[str, Any]]:
    file = folder / "index.jsonl"
    if not file.is_file():
        raise LedgerError(f"{folder}: no ledger here: made with ledger.every = 0, without a step yet, or taken away")
    index = {}
    lines = re.findall(r"[^\n]*\n|[^\n]+", _read_text(file))
    torn = bool(lines) and not lines[-1].endswith("\n")  # a crash: the step it was for is not in the ledger
    for at, line in enumerate(lines[: len(lines) - torn], 1):
        try:
            entry = json.loads(line)
            index[int(entry["step"])] = {"files": dict(entry["files"]), "tensors": dict(entry["tensors"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise LedgerError(f"{file}:{at}: not a line of a ledger's index") from None
    return index


def _unchanged(file: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return _sha256(file.read_bytes()) == entry["files"].get(file.name)
    except OSError as error:
        raise LedgerError(f"{file}: cannot be read: {error.strerror}") from None


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("ledger", "{}"))
            if about.get("version") != LEDGER_VERSION:
                raise LedgerError(
                    f"{file}: a ledger of version {str(about.get('version'))[:20]}, this program reads version "
                    f"{LEDGER_VERSION}"
                )
            components = [str(name) for name in about["components"]]
            return {name: opened.get_tensor(name) for name in opened.keys()}, components  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(f"{file}: cannot be read: {type(error).__name__}") from None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(_read_text(file).splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or "kind" not in value:
            raise LedgerError(f"{file}:{number}: not a line of a ledger")
        lines.append(value)
    if not lines:
        raise LedgerError(f"{file}: empty")
    return lines


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # as it is: reading as text would turn a \r into a newline
    except (OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"{file}: cannot be read: {type(error).__name__}") from None


def _number(line: str) -> int | None:
    """The step of an index line; None for a line torn by a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _tensor_sha256(tensor: Tensor) -> str:
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return _sha256(head + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
