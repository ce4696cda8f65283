"""The ledger: one record per training step, from which `grpo replay` recomputes everything.

runs/NAME/ledger/
    index.jsonl               one line per step: the sha256 of its two files
    step_000001.safetensors   numbers: see `TENSOR_SPECS`
    step_000001.jsonl         one line of kind "step" (the metrics), then one per group, then one per completion

With ``text = "redacted"`` neither texts nor token ids are written, only lengths and the sha256 of each text; with "off"
the JSONL file contains only the line of kind "step".
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from grpo.metrics import TokenTerms, rewards_of
from grpo.runtime.atomic_files import append_line_synced, make_private_folder, remove_if_present, write_atomic
from grpo.runtime.errors import UserError
from grpo.runtime.tensor_files import open_tensors, read_tensor_header
from grpo.types import Batch, Case, Completion, Group, Prompt, ReplacedGroup, StepLogprobs, StepRecord
from rewards import Answer, FiredRule, Score
from rewards.safe_files import MEBIBYTE, InvalidFile, is_regular, iter_lines, open_regular, parse_json
from rewards.types import Reason

LEDGER_VERSION = 2
TRAINER_ONLY_METRICS = ("loss/trained", "grad_norm", "skipped")
"""Metrics that cannot be recomputed from a step: they are read from its recorded metrics."""
TENSOR_SPECS = {
    "groups": ("N", "I32"),  # index of each row's group
    "lengths": ("N", "I32"),  # tokens of each completion, end token included
    "prompt_lengths": ("B", "I32"),
    "thinking": ("B", "BOOL"),  # whether the prompt ends inside an opened <think>
    "gold": ("B", "U8"),
    "finished": ("N", "BOOL"),
    "predicted": ("N", "U8"),  # 0: no level was parsed
    "components": ("KN", "F64"),  # parts of the reward, in the order of the metadata's `components`
    "rewards": ("N", "F64"),
    "in_baseline": ("N", "BOOL"),
    "advantages": ("N", "F64"),
    "shares": ("KN", "F64"),  # parts of the advantage
    "token_weights": ("N", "F32"),  # weight of each token of the row in the loss
    "prompt_ids": ("P", "I32"),  # packed group after group; text = "full" only
    "completion_ids": ("M", "I32"),  # packed row after row, as are the following; text = "full" only
    "sampler_logprobs": ("M", "F32"),  # nats
    "logprobs": ("EM", "F32"),  # nats, at the start of each inner epoch; row 0 is the old policy
    "ref_logprobs": ("M", "F32"),  # nats; beta > 0 only
    "entropy": ("M", "F32"),  # nats
    "ratio": ("EM", "F64"),
    "clip": ("EM", "I8"),  # −1 at the lower bound, +1 at the upper bound
    "kl": ("EM", "F64"),  # nats; beta > 0 only
    "loss": ("EM", "F64"),  # each token's term; math.fsum over a row is the loss of that inner epoch
}
"""Tensors of a step → (dimensions, safetensors dtype). Each letter is one dimension with the same size everywhere:
B groups, N completions, K reward components, E inner epochs, P prompt tokens, M completion tokens."""
MAX_ELEMENTS = 2**31
"""Elements of all tensors of a step together. Steps of the real recipe have about 1e6."""
MAX_PADDED_TOKENS = 2**28
"""Rows × longest row of a padded batch."""
MAX_LINE_BYTES = 256 * MEBIBYTE
"""A line contains the whole text of a completion."""


@dataclass(frozen=True, slots=True)
class LedgerStep:
    """One step read from the ledger, with the arrays [B,G] fp64 as they were recorded."""

    step: StepRecord
    account: TokenTerms
    advantages: np.ndarray
    rewards: np.ndarray
    shares: dict[str, np.ndarray]
    metrics: dict[str, Any]
    text: str
    """``ledger.text`` of the run."""
    modified_files: tuple[str, ...]
    """Files whose sha256 is not the one in the index."""


def write_step(
    folder: Path,
    step: StepRecord,
    account: TokenTerms,
    shares: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
    *,
    text: str,
) -> None:
    """Append a step: write its two files, then its index line. Everything is on disk when this returns.

    Args:
        text: "full", "redacted" or "off"; see the module docstring.

    Raises:
        DiskError: a file cannot be written; the index then has no line for this step.
    """
    make_private_folder(folder)
    tensors = {name: value.contiguous() for name, value in _tensors(step, account, shares, text).items()}
    # a single key: safetensors writes several keys in an order that varies between processes
    metadata = {"ledger": json.dumps({"version": LEDGER_VERSION, "step": step.number, "components": list(shares)})}
    lines = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in _lines(step, metrics, text))
    contents = dict(zip(step_files(folder, step.number), (save(tensors, metadata), lines.encode("utf-8")), strict=True))
    for file, content in contents.items():
        write_atomic(file, content)
    hashes = {file.name: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    append_line_synced(folder / "index.jsonl", json.dumps({"step": step.number, "files": hashes}))


def recorded_steps(folder: Path) -> tuple[int, ...]:
    """Return the numbers of the recorded steps in order. Raises `UserError` if the index is missing or broken."""
    return tuple(sorted(_index(folder)))


def read_step(folder: Path, number: int) -> LedgerStep:
    """Read one step and compare its files with the sha256 in the index.

    Raises:
        UserError: the step is not in the ledger, or its files cannot be read.
    """
    modified = modified_files(folder, number)
    tensor_file, line_file = step_files(folder, number)
    try:
        tensors, components = _read_tensors(tensor_file)
        return _ledger_step(number, tensors, components, _read_lines(line_file), tuple(modified))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        fault = str(error)
        if not isinstance(error, UserError):
            reason = f": {error}" if type(error) is ValueError else ""
            fault = f"{folder}: the files of step {number} do not fit together{reason}"
        since = f" (changed since they were written: {', '.join(modified)})" if modified else ""
        raise UserError(f"{fault}{since}") from None


def modified_files(folder: Path, number: int) -> list[str]:
    """Return the files of a step whose sha256 is not the one in the index.

    Raises:
        UserError: the step is not in the index, or a file cannot be read.
    """
    index = _index(folder)
    if number not in index:
        steps = f"it has steps {min(index)} to {max(index)}" if index else "it is empty"
        raise UserError(f"{folder}: no step {number} in this ledger: {steps}")
    modified = []
    for file in step_files(folder, number):
        with file_errors(file), open_regular(file) as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != index[number].get(file.name):
                modified.append(f"ledger/{file.name}")
    return modified


def truncate_ledger(folder: Path, *, step: int) -> None:
    """Delete all steps after ``step``, which a resumed run repeats."""
    if not folder.is_dir():
        return
    write_atomic(folder / "index.jsonl", lines_up_to(folder / "index.jsonl", step))
    remove_later_files(folder, step)


def remove_later_files(folder: Path, step: int) -> None:
    """Remove the files of steps after ``step``, and those that a crash left half written."""
    for path in folder.glob("*"):
        match = re.fullmatch(r"\.?step_(\d{6,})\D.*", path.name)
        if match and (int(match[1]) > step or path.suffix == ".partial"):
            remove_if_present(path)


def lines_up_to(file: Path, step: int) -> str:
    """Return the lines of a JSONL file whose "step" is at most ``step``. Lines torn by a crash have none. A missing
    file has no lines."""
    lines = {}
    with file_errors(file):
        for line in iter_lines(file) if os.path.lexists(file) else ():
            with contextlib.suppress(InvalidFile, KeyError, TypeError, IndexError):
                number = parse_json(line)["step"]
                if type(number) is int and number <= step:
                    lines[number] = line.decode().rstrip("\r\n") + "\n"
    return "".join(lines.values())


def step_files(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the safetensors file and the JSONL file of a step."""
    return folder / f"step_{number:06d}.safetensors", folder / f"step_{number:06d}.jsonl"


@contextlib.contextmanager
def file_errors(file: Path) -> Iterator[None]:
    """Turn `InvalidFile`, which does not contain the path, and errors of the disk into a `UserError` with the path."""
    try:
        yield
    except InvalidFile as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _tensors(step: StepRecord, account: TokenTerms, shares: Mapping[str, np.ndarray], text: str) -> dict[str, Tensor]:
    batch, tokens = step.batch, step.logprobs
    completions = [completion for group in step.groups for completion in group.completions]
    scores = [score for row in step.scores for score in row]
    tensors = {
        "groups": torch.tensor([b for b, g in enumerate(step.groups) for _ in g.completions], dtype=torch.int32),
        "lengths": torch.tensor([len(c.ids) for c in completions], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(group.prompt.ids) for group in step.groups], dtype=torch.int32),
        "thinking": torch.tensor([group.prompt.thinking for group in step.groups]),
        "gold": torch.tensor([group.prompt.case.gold_level for group in step.groups], dtype=torch.uint8),
        "finished": torch.tensor([c.finished for c in completions]),
        "predicted": torch.tensor([score.answer.level or 0 for score in scores], dtype=torch.uint8),
        "components": torch.tensor([list(score.parts.values()) for score in scores], dtype=torch.float64).T,
        "rewards": torch.from_numpy(rewards_of(step).flatten()),
        "in_baseline": batch.baseline_mask,
        "advantages": batch.advantages,
        "shares": torch.from_numpy(np.stack([share.flatten() for share in shares.values()])),
        "token_weights": batch.token_weights[:, 0],
        "sampler_logprobs": batch.sampler_logprobs[batch.completion_mask],
        "logprobs": tokens.logprobs,
        "entropy": tokens.entropy,
        "ratio": account.ratio,
        "clip": account.clip_side,
        "loss": account.loss,
    }
    if tokens.ref_logprobs is not None and account.kl is not None:
        tensors |= {"ref_logprobs": tokens.ref_logprobs, "kl": account.kl}
    if text == "full":
        tensors["prompt_ids"] = torch.tensor([i for group in step.groups for i in group.prompt.ids], dtype=torch.int32)
        tensors["completion_ids"] = torch.tensor([i for c in completions for i in c.ids], dtype=torch.int32)
    return tensors


def _lines(step: StepRecord, metrics: Mapping[str, Any], text: str) -> Iterator[dict[str, Any]]:
    dropped = [asdict(group) | ({"case_id": ""} if text == "off" else {}) for group in step.replaced_groups]
    yield {"kind": "step", "step": step.number, "text": text, "metrics": dict(metrics), "dropped": dropped}
    if text == "off":
        return
    for b, group in enumerate(step.groups):
        case = group.prompt.case
        yield {"kind": "group", "group": b, "case": case.id, "tags": list(case.tags), **_text_fields(case.text, text)}
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
                **_text_fields(completion.text, text),
            }


def _text_fields(content: str, text: str) -> dict[str, Any]:
    if text == "full":
        return {"content": content}
    sha256 = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return {"sha256": sha256, "characters": len(content)}


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Metadata(_Line):
    version: Literal[2]
    components: list[str]


class _StepLine(_Line):
    kind: Literal["step"]
    step: int
    text: Literal["full", "redacted", "off"]
    metrics: dict[str, StrictInt | StrictFloat | None]
    dropped: tuple[ReplacedGroup, ...]


class _GroupLine(_Line):
    kind: Literal["group"]
    group: int
    case: str = ""
    tags: tuple[str, ...] = ()
    content: str = ""


class _CompletionLine(_Line):
    kind: Literal["completion"]
    group: int
    member: int
    reason: Reason
    span: tuple[int, int] | None
    fired: tuple[FiredRule, ...]
    timed_out: bool
    content: str = ""


class _IndexLine(_Line):
    step: int
    files: dict[str, str]


_JsonLine = _StepLine | _GroupLine | _CompletionLine
_JSON_LINE: TypeAdapter[_JsonLine] = TypeAdapter(Annotated[_JsonLine, Field(discriminator="kind")])


def _index(folder: Path) -> dict[int, dict[str, str]]:
    """Return the sha256 of each file of each step."""
    file = folder / "index.jsonl"
    if not is_regular(file):
        raise UserError(f"{folder}: no ledger in this run (ledger.every = 0, no step finished yet, or deleted)")
    index = {}
    for number, line in enumerate(_raw_lines(file), 1):
        if not line.endswith(b"\n"):
            break  # torn by a crash, so its step is not in the ledger
        try:
            index_line = _IndexLine.model_validate(parse_json(line))
        except (InvalidFile, ValidationError):
            raise UserError(f"{file}:{number}: not a line of a ledger's index") from None
        index[index_line.step] = index_line.files
    return index


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a step and its components, after comparing the header with `TENSOR_SPECS`."""
    with file_errors(file):
        sizes: dict[str, int] = {}
        headers = read_tensor_header(file)
        for name, header in headers.items():
            dims, dtype = TENSOR_SPECS.get(name, ("", ""))
            if header.dtype != dtype or len(header.shape) != len(dims):
                raise UserError(f"{file}: contains a tensor that no ledger has, or one of another dtype or shape")
            if any(sizes.setdefault(dim, size) != size for dim, size in zip(dims, header.shape, strict=True)):
                raise UserError(f"{file}: its tensors do not fit together")
        elements = sum(math.prod(header.shape) for header in headers.values())
        if elements > MAX_ELEMENTS:
            raise UserError(f"{file}: {elements:,} numbers exceed the maximum of {MAX_ELEMENTS:,} per step")
        with open_tensors(file) as opened:
            try:
                metadata = _Metadata.model_validate(parse_json((opened.metadata() or {}).get("ledger", "{}")))
            except ValidationError:
                raise UserError(f"{file}: its metadata is not of ledger version {LEDGER_VERSION}") from None
            return {name: opened.get_tensor(name) for name in headers}, metadata.components


def _read_lines(file: Path) -> list[_JsonLine]:
    lines = []
    for number, line in enumerate(_raw_lines(file), 1):
        try:
            lines.append(_JSON_LINE.validate_python(parse_json(line)))
        except (InvalidFile, ValidationError):
            raise UserError(f"{file}:{number}: not a line of a ledger") from None
    return lines


def _raw_lines(file: Path) -> Iterator[bytes]:
    with file_errors(file):
        yield from iter_lines(file, longest=MAX_LINE_BYTES)


def _ledger_step(
    number: int, tensors: Mapping[str, Tensor], components: list[str], lines: list[_JsonLine], modified: tuple[str, ...]
) -> LedgerStep:
    step_line = lines[0] if lines else None
    if not isinstance(step_line, _StepLine) or step_line.step != number:
        raise ValueError(f"the first line of the JSONL file is not that of step {number}")
    groups, scores = _groups(tensors, components, lines)
    shape = (len(groups), len(groups[0].completions))
    mask = torch.arange(int(tensors["lengths"].max())) < tensors["lengths"][:, None]
    sampler_logprobs = torch.zeros(mask.shape)
    sampler_logprobs[mask] = tensors["sampler_logprobs"]
    batch = Batch(
        prompt_ids=tuple(group.prompt.ids for group in groups for _ in group.completions),
        completion_ids=tuple(completion.ids for group in groups for completion in group.completions),
        completion_mask=mask,
        sampler_logprobs=sampler_logprobs,
        baseline_mask=tensors["in_baseline"],
        advantages=tensors["advantages"],
        token_weights=torch.where(mask, tensors["token_weights"][:, None], 0.0),
    )
    tokens = StepLogprobs(tensors["logprobs"], tensors.get("ref_logprobs"), tensors["entropy"])
    trainer_only: list[Any] = [step_line.metrics[name] for name in TRAINER_ONLY_METRICS]
    return LedgerStep(
        step=StepRecord(number, groups, scores, batch, tokens, step_line.dropped, *trainer_only),
        account=TokenTerms(tensors["ratio"], tensors["clip"], tensors.get("kl"), tensors["loss"]),
        advantages=tensors["advantages"].numpy().reshape(shape),
        rewards=tensors["rewards"].numpy().reshape(shape),
        shares={name: share.numpy().reshape(shape) for name, share in zip(components, tensors["shares"], strict=True)},
        metrics=step_line.metrics,
        text=step_line.text,
        modified_files=modified,
    )


def _groups(
    tensors: Mapping[str, Tensor], components: list[str], lines: list[_JsonLine]
) -> tuple[tuple[Group, ...], tuple[tuple[Score, ...], ...]]:
    """Rebuild groups and scores. Where texts were not recorded, texts are empty and token ids are zeros."""
    lengths, prompt_lengths = tensors["lengths"].tolist(), tensors["prompt_lengths"].tolist()
    size = len(lengths) // len(prompt_lengths) if prompt_lengths else 0
    if not size or tensors["groups"].tolist() != [b for b in range(len(prompt_lengths)) for _ in range(size)]:
        raise ValueError("`groups` does not match `prompt_lengths`")
    padded_tokens = max(len(row) * max(row) for row in (lengths, prompt_lengths))
    if min(lengths) < 1 or min(prompt_lengths) < 0 or padded_tokens > MAX_PADDED_TOKENS:
        raise ValueError(f"a length is out of range, or the padded batch exceeds {MAX_PADDED_TOKENS:,} tokens")
    group_lines = {line.group: line for line in lines if isinstance(line, _GroupLine)}
    completion_lines = {(line.group, line.member): line for line in lines if isinstance(line, _CompletionLine)}
    prompts, completions, scores = [], [], []
    prompt_ids = _unpack(tensors.get("prompt_ids"), prompt_lengths)
    columns = (prompt_ids, tensors["gold"].tolist(), tensors["thinking"].tolist())
    for b, (ids, gold, thinking) in enumerate(zip(*columns, strict=True)):
        group_line = group_lines.get(b, _GroupLine(kind="group", group=b))
        prompts.append(Prompt(Case(group_line.case, group_line.content, gold, group_line.tags), ids, thinking))
    rows = zip(
        _unpack(tensors.get("completion_ids"), lengths),
        _unpack(tensors["sampler_logprobs"], lengths),
        *(tensors[name].tolist() for name in ("finished", "predicted", "rewards")),
        tensors["components"].T.tolist(),
        strict=True,
    )
    for row, (ids, logprobs, finished, predicted, total, parts) in enumerate(rows):
        line = completion_lines.get(divmod(row, size))
        reason: Reason = "parsed" if predicted else "no answer"
        answer = Answer(predicted or None, line.reason if line else reason, line.span if line else None)
        fired, timed_out = (line.fired, line.timed_out) if line else ((), False)
        completions.append(Completion(ids, logprobs, finished, line.content if line else ""))
        scores.append(Score(total, dict(zip(components, parts, strict=True)), answer, fired, timed_out))
    starts = range(0, len(lengths), size)
    groups = (Group(prompt, tuple(completions[i : i + size])) for prompt, i in zip(prompts, starts, strict=True))
    return tuple(groups), tuple(tuple(scores[i : i + size]) for i in starts)


def _unpack(packed: Tensor | None, lengths: list[int]) -> list[tuple[Any, ...]]:
    if packed is None:
        return [(0,) * length for length in lengths]
    return [tuple(row.tolist()) for row in packed.split(lengths)]
