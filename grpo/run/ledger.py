"""What a step was, written down: one record a step, from which `grpo replay` computes everything again.

runs/NAME/ledger/
    index.jsonl               a line a step: sha256 of its two files and of every tensor
    step_000001.safetensors   numbers: see `TENSORS`
    step_000001.jsonl         a line of kind "step" (the metrics), then one a group, then one a completion

With ``text = "redacted"`` no text and no token id is written, only lengths and sha256 of the texts; with "off" the
JSONL holds the line of the step alone.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from grpo.metrics import TokenAccount, rewards_of
from grpo.runtime.atomic_files import append_line, make_folder, write_whole, writing
from grpo.runtime.errors import UserError
from grpo.runtime.tensor_files import declared, open_tensors
from grpo.types import Batch, Case, Completion, Dropped, Group, Prompt, Step, TokenRecord
from rewards import Answer, Fired, Score
from rewards.safe_files import MEBIBYTE, Unreadable, is_regular, open_regular, parse_json, raw_lines
from rewards.types import Reason

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


DTYPES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "int32": "I32", "fp32": "F32", "fp64": "F64"}
"""Types in `TENSORS` → in a safetensors header."""
MOST_ELEMENTS = 2**31
"""Of a step's tensors together. The real recipe's steps have 1e6."""
MOST_SPREAD = 2**28
"""Rows times the longest of them: what a step is spread out to."""
LONGEST_LINE = 256 * MEBIBYTE
"""Bytes; a completion's text is in one."""


class LedgerChanged(UserError):
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
    """Numbers of the steps in a ledger, in order. Raises `UserError` where there is none or its index is broken."""
    return tuple(sorted(_index(folder)))


def read_step(folder: Path, number: int) -> Entry:
    """A step as it was written, every file and tensor held against the index.

    Raises:
        UserError: the step is not there, or a file cannot be read at all.
    """
    index = _index(folder)
    if number not in index:
        there = f"it holds {min(index)} to {max(index)}" if index else "it is empty"
        raise UserError(f"{folder}: no step {number} in this ledger: {there}")
    tensor_file, line_file = step_files(folder, number)
    changed = [f"ledger/{file.name}" for file in (tensor_file, line_file) if not _unchanged(file, index[number])]
    try:
        tensors, components = _read_tensors(tensor_file)
        before = index[number].tensors
        names = [*before, *(name for name in tensors if name not in before)]
        changed += [
            f"ledger/{tensor_file.name}: {name}"
            for name in names
            if name not in tensors or _tensor_sha256(tensors[name]) != before.get(name)
        ]
        return _entry(*_read_lines(line_file), number, tensors, components, tuple(changed))
    except (UserError, KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = error if isinstance(error, UserError) else f"{folder}: the files of step {number} do not fit together"
        since = f" (changed since they were written: {', '.join(changed)})" if changed else ""
        raise (LedgerChanged if changed else UserError)(f"{what}{since}") from None


def read_lengths(folder: Path, number: int) -> tuple[list[int], list[bool]]:
    """Of each row of a step: its tokens, and whether it ended by itself. Nothing is held against the index.

    Raises:
        UserError: the file cannot be read.
    """
    file, _ = step_files(folder, number)
    _check_shapes(file)
    try:
        with open_tensors(file) as opened:
            return opened.get_tensor("lengths").tolist(), opened.get_tensor("finished").tolist()
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None


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
    head: "_StepLine",
    lines: list["_GroupLine | _CompletionLine"],
    number: int,
    tensors: Mapping[str, Tensor],
    components: list[str],
    changed: tuple[str, ...],
) -> Entry:
    if head.step != number:
        raise ValueError("another step's line")
    groups, scores = _groups(tensors, components, lines)
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
    dropped = tuple(Dropped(one.case_id, one.lengths, one.finished, one.rewards) for one in head.dropped)
    figures: list[Any] = [head.metrics[name] for name in FIGURES]
    return Entry(
        step=Step(number, groups, scores, batch, record, dropped, *figures),
        account=TokenAccount(tensors["ratio"], tensors["clip"], tensors.get("kl"), tensors["loss"]),
        advantages=tensors["advantages"].numpy().reshape(shape),
        rewards=tensors["rewards"].numpy().reshape(shape),
        shares={name: share.numpy().reshape(shape) for name, share in zip(components, tensors["shares"], strict=True)},
        metrics=head.metrics,
        text=head.text,
        changed=changed,
    )


def _groups(
    tensors: Mapping[str, Tensor], components: list[str], lines: list["_GroupLine | _CompletionLine"]
) -> tuple[tuple[Group, ...], tuple[tuple[Score, ...], ...]]:
    """Groups and scores as they were. Where texts were not written, texts are empty and ids are zeros."""
    heads = {line.group: line for line in lines if isinstance(line, _GroupLine)}
    said = {(line.group, line.member): line for line in lines if isinstance(line, _CompletionLine)}
    lengths, sampler = tensors["lengths"].tolist(), tensors["sampler_logprobs"].tolist()
    ids = tensors["completion_ids"].tolist() if "completion_ids" in tensors else [0] * len(sampler)
    prompt_lengths = tensors["prompt_lengths"].tolist()
    prompt_ids = tensors["prompt_ids"].tolist() if "prompt_ids" in tensors else [0] * sum(prompt_lengths)
    if min(lengths, default=0) < 1 or min(prompt_lengths) < 0 or len(lengths) * max(lengths) > MOST_SPREAD:
        raise ValueError("lengths that none can have")
    if len(sampler) != sum(lengths) or len(ids) != sum(lengths) or len(prompt_ids) != sum(prompt_lengths):
        raise ValueError("token counts disagree")
    owners, predicted, finished = (tensors[name].tolist() for name in ("groups", "predicted", "finished"))
    sizes = Counter(owners)
    if owners != sorted(owners) or set(sizes) != set(range(len(prompt_lengths))):
        raise ValueError("rows without a group, or groups without a row")
    parts, totals = tensors["components"].T.tolist(), tensors["rewards"].tolist()
    groups, scores = [], []
    row, at, prompt_at = 0, 0, 0
    for b, (gold, thinking, width) in enumerate(
        zip(tensors["gold"].tolist(), tensors["thinking"].tolist(), prompt_lengths, strict=True)
    ):
        head = heads.get(b, _GroupLine(kind="group", group=b))
        case = Case(head.case, head.content, gold, head.tags)
        prompt = Prompt(case, tuple(prompt_ids[prompt_at : prompt_at + width]), thinking)
        prompt_at += width
        completions, row_scores = [], []
        for member in range(sizes[b]):
            line, stop = said.get((b, member)), at + lengths[row]
            text = line.content if line else ""
            completions.append(Completion(tuple(ids[at:stop]), tuple(sampler[at:stop]), finished[row], text))
            row_scores.append(_score(line, dict(zip(components, parts[row], strict=True)), totals[row], predicted[row]))
            row, at = row + 1, stop
        groups.append(Group(prompt, tuple(completions)))
        scores.append(tuple(row_scores))
    return tuple(groups), tuple(scores)


def _score(line: "_CompletionLine | None", parts: dict[str, float], total: float, predicted: int) -> Score:
    if line is None:
        return Score(total, parts, Answer(predicted or None, "parsed" if predicted else "no answer", None), (), False)
    fired = tuple(Fired(one.rule, one.span, one.value) for one in line.fired)
    return Score(total, parts, Answer(predicted or None, line.reason, line.span), fired, line.timed_out)


class _Line(BaseModel):
    """A line as `_lines` writes it; what is read of one is checked before anything is made of it."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


_Place = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]


class _Dropped(_Line):
    case_id: str
    lengths: tuple[_Place, ...]
    finished: tuple[bool, ...]
    rewards: tuple[float, ...]


class _StepLine(_Line):
    kind: Literal["step"]
    step: _Place
    text: Literal["full", "redacted", "off"]
    metrics: dict[str, _Number | None]
    dropped: tuple[_Dropped, ...]


class _GroupLine(_Line):
    kind: Literal["group"]
    group: _Place
    case: str = ""
    tags: tuple[str, ...] = ()
    content: str = ""


class _Fired(_Line):
    rule: str
    span: tuple[_Place, _Place] | None
    value: float


class _CompletionLine(_Line):
    kind: Literal["completion"]
    group: _Place
    member: _Place
    reason: Reason
    span: tuple[_Place, _Place] | None
    fired: tuple[_Fired, ...]
    timed_out: bool
    content: str = ""


_KINDS: dict[object, type[_GroupLine] | type[_CompletionLine]] = {"group": _GroupLine, "completion": _CompletionLine}


class _IndexLine(_Line):
    step: _Place
    files: dict[str, str]
    tensors: dict[str, str]


def _index(folder: Path) -> dict[int, _IndexLine]:
    file = folder / "index.jsonl"
    if not is_regular(file):
        raise UserError(f"{folder}: no ledger here: made with ledger.every = 0, without a step yet, or taken away")
    index = {}
    for at, line in enumerate(_raw_lines(file), 1):
        if not line.endswith(b"\n"):
            break  # torn by a crash: the step it was for is not in the ledger
        try:
            entry = _IndexLine.model_validate(parse_json(line))
        except (Unreadable, ValidationError):
            raise UserError(f"{file}:{at}: not a line of a ledger's index") from None
        index[entry.step] = entry
    return index


def _unchanged(file: Path, entry: _IndexLine) -> bool:
    try:
        with open_regular(file) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == entry.files.get(file.name)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    _check_shapes(file)
    try:
        with open_tensors(file) as opened:
            about = parse_json((opened.metadata() or {}).get("ledger", "{}"))
            if not isinstance(about, dict) or about.get("version") != LEDGER_VERSION:
                version = about.get("version") if isinstance(about, dict) else None
                raise UserError(
                    f"{file}: a ledger of version {str(version)[:20]}, this program reads version {LEDGER_VERSION}"
                )
            components = [str(name) for name in about["components"]]
            return {name: opened.get_tensor(name) for name in opened.keys()}, components  # noqa: SIM118
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
    except (KeyError, TypeError):
        raise UserError(f"{file}: cannot be read: its metadata name no components") from None


def _check_shapes(file: Path) -> None:
    """Every tensor is one of `TENSORS`, of its type, and the same letter is the same number everywhere."""
    sizes: dict[str, int] = {}
    elements = 0
    try:
        header = declared(file)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
    for name, told in header.items():
        dims, _, rest = TENSORS.get(name, "").removeprefix("[").partition("] ")
        letters, dtype = dims.split(","), DTYPES.get(rest.split()[0].rstrip(",") if rest else "")
        if told.dtype != dtype or len(told.shape) != len(letters):
            raise UserError(f"{file}: holds a tensor that no ledger has, or of another type")
        if any(sizes.setdefault(letter, side) != side for letter, side in zip(letters, told.shape, strict=True)):
            raise UserError(f"{file}: its tensors do not fit together")
        elements += math.prod(told.shape)
    if elements > MOST_ELEMENTS:
        raise UserError(f"{file}: {elements:,} numbers, more than any step has")


def _read_lines(file: Path) -> tuple[_StepLine, list[_GroupLine | _CompletionLine]]:
    head, lines = None, []
    for number, line in enumerate(_raw_lines(file), 1):
        try:
            value = parse_json(line)
            if head is None:
                head = _StepLine.model_validate(value)
            else:
                lines.append(_KINDS[value["kind"]].model_validate(value))
        except (Unreadable, ValidationError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: not a line of a ledger") from None
    if head is None:
        raise UserError(f"{file}: empty")
    return head, lines


def _raw_lines(file: Path) -> Iterator[bytes]:
    try:
        yield from raw_lines(file, longest=LONGEST_LINE)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None


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
