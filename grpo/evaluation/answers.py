"""Cases → answers, under the evaluation's own budget and temperature, and the file that keeps them as they come.

The noise of an answer depends on the seed, the set, the mode, the case and which of its answers it is: never on the
training step, the batch, or what was answered before. Two evaluations differ by the policy alone.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from grpo.cases import row_key
from grpo.config import Config
from grpo.evaluation.metrics import Verdict, row
from grpo.policy.policy import Policy
from grpo.prompts import render_prompt
from grpo.rollout import check_length, rollout
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import EVALUATION, memory_errors
from grpo.types import Case, Prompt
from rewards import Answer, parse_answer
from rewards.parse import FORMATS
from rewards.safe_files import MEBIBYTE, Unreadable, clipped, is_regular, raw_lines
from rewards.types import Reason

LONGEST_LINE = 64 * MEBIBYTE
"""Bytes; an answer's text is in one."""
Known = Mapping[tuple[str, int], Verdict]
"""(case id, sample) → its answer."""


VERDICTS = TypeAdapter(list[Verdict])


def evaluate(
    policy: Policy,
    cases: Sequence[Case],
    config: Config,
    *,
    name: str,
    thinking: bool,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[Verdict, ...]:
    """One sampled answer to every case, in their order. Each rank of the policy answers its share.

    Args:
        name: of the set; part of the noise key.
        thinking: the chat template's switch.
        progress: called with the number of cases just answered, here and as many elsewhere.
    """
    ranks, section = policy.ranks, config.evaluate
    share = ranks.mine(len(cases))
    found: list[Verdict] = []
    with memory_errors("evaluation", EVALUATION, policy.independent_ranks):
        for verdicts in answer(policy, [cases[i] for i in share], config, name=name, thinking=thinking):
            found += verdicts
            progress(len(verdicts) * len(cases) // len(share))
        largest = -(-len(cases) // ranks.size)
        for _ in range(-(-largest // section.batch_size) - -(-len(share) // section.batch_size)):
            # a sharded policy answers on all ranks at once
            rollout(policy, [], [], max_new_tokens=section.max_new_tokens, temperature=section.temperature)
    return in_order(ranks.gather(found, VERDICTS), cases)


def answer(
    policy: Policy,
    cases: Sequence[Case],
    config: Config,
    *,
    name: str,
    thinking: bool,
    samples: int = 1,
    formats: Sequence[str] = tuple(FORMATS),
    known: Known | None = None,
) -> Iterator[tuple[Verdict, ...]]:
    """``samples`` answers to every case, batch by batch: each batch's answers that are not ``known`` yet.

    Batches are cut from all there is to answer, whatever is known: a batch that misses an answer is decoded whole, so
    that a continued evaluation gives the bits of one that was never interrupted.

    Args:
        name: of the set; part of the noise key.
        thinking: the chat template's switch.
        samples: answers to a case; the first is the same whatever their number.
        formats: how an answer may be written, see `rewards.parse.FORMATS`.
        known: what need not be answered again.

    Raises:
        UserError: a case does not fit the model's context; before the first answer.
    """
    known = known or {}
    prompts = [
        render_prompt(policy.tokenizer, c, system_prompt=config.cases.system_prompt, thinking=thinking) for c in cases
    ]
    for prompt in prompts:
        check_length(policy, prompt, config.evaluate.max_new_tokens)
    prompts.sort(key=lambda prompt: (len(prompt.ids), prompt.case.id))
    wanted = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    size = config.evaluate.batch_size
    for start in range(0, len(wanted), size):
        batch = wanted[start : start + size]
        if any((prompt.case.id, sample) not in known for prompt, sample in batch):
            verdicts = _decoded(policy, batch, config, name=name, thinking=thinking, formats=formats)
            yield tuple(v for v in verdicts if (v.case.id, v.sample) not in known)


def _decoded(
    policy: Policy,
    batch: Sequence[tuple[Prompt, int]],
    config: Config,
    *,
    name: str,
    thinking: bool,
    formats: Sequence[str],
) -> Iterator[Verdict]:
    """The answers of one batch; a prompt that it holds several times is prefilled once."""
    rows = [(prompt, [sample for _, sample in same]) for prompt, same in groupby(batch, key=lambda item: item[0])]
    groups = rollout(
        policy,
        [prompt for prompt, _ in rows],
        [
            [noise_key(config.train.seed, name, thinking, prompt.case.id, k) for k in members]
            for prompt, members in rows
        ],
        max_new_tokens=config.evaluate.max_new_tokens,
        temperature=config.evaluate.temperature,
    )
    for group, (_, members) in zip(groups, rows, strict=True):
        for completion, sample in zip(group.completions, members, strict=True):
            yield Verdict(
                case=group.prompt.case,
                answer=parse_answer(completion.text, thinking=group.prompt.thinking, formats=formats),
                finished=completion.finished,
                tokens=len(completion.ids),
                text=completion.text,
                sample=sample,
            )


def noise_key(seed: int, name: str, thinking: bool, case_id: str, sample: int) -> int:
    """The noise of one answer. The first sample's is that of an evaluation during training.

    >>> noise_key(42, "test", True, "c1", 0) == row_key("evaluate", 42, "test", "True", "c1")
    True
    """
    return row_key("evaluate", seed, name, str(thinking), case_id, *([sample] if sample else []))


def in_order(verdicts: Sequence[Verdict], cases: Sequence[Case]) -> tuple[Verdict, ...]:
    """The verdicts in the order of the cases, and of their samples."""
    place = {case.id: i for i, case in enumerate(cases)}
    return tuple(sorted(verdicts, key=lambda verdict: (place[verdict.case.id], verdict.sample)))


class _Row(BaseModel):
    """A line that `grpo.evaluation.metrics.row` wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    id: str
    sample: Annotated[int, Field(ge=0)]
    predicted: Any = None
    reason: Any = None
    finished: bool
    tokens: Annotated[int, Field(ge=1)]
    completion: str | None = None
    """None with a ``ledger.text`` that keeps words out of files: then the parse is taken as it stands."""


def append_answers(path: Path, verdicts: Sequence[Verdict], *, text: bool = True) -> None:
    """Adds lines to a file of answers and waits until they are on the disk.

    Args:
        text: whether the answers' words are written, beside case id, levels and length.
    """
    rows = ({key: value for key, value in row(one).items() if text or key != "completion"} for one in verdicts)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(one) + "\n" for one in rows))
        file.flush()
        os.fsync(file.fileno())


def read_answers(
    path: Path, cases: Sequence[Case], samples: int, *, thinking: bool, formats: Sequence[str] = tuple(FORMATS)
) -> dict[tuple[str, int], Verdict]:
    """What a file of answers already holds; empty where there is none. A last line that a crash tore is cut off.

    What an answer says is parsed again: the level that the line names may be another program's reading, or an edit. A
    file in which such a level differs is written anew with what its answers say.

    Args:
        thinking: whether the prompts ended inside an opened ``<think>``.
        formats: how an answer may be written, see `rewards.parse.FORMATS`.

    Raises:
        UserError: any other line that is no answer to one of the cases.
    """
    if not is_regular(path):
        return {}
    by_id = {case.id: case for case in cases}
    found: dict[tuple[str, int], Verdict] = {}
    stale, worded = False, True
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            held = _Row.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in fault["loc"]) or "the line"
            raise UserError(f"{path}:{number}: {where}: {fault['type']}: not a line of answers; {_AFRESH}") from None
        if held.id not in by_id or held.sample >= samples or (held.id, held.sample) in found:
            raise UserError(
                f"{path}:{number}: case {clipped(held.id)}, sample {held.sample}: not asked for, or twice; {_AFRESH}"
            )
        worded &= held.completion is not None
        said = _said(held, thinking, formats)
        if said is None:
            raise UserError(f"{path}:{number}: neither words nor a parse: not a line of answers; {_AFRESH}")
        stale |= (held.predicted, held.reason) != (said.level, said.reason)
        found[held.id, held.sample] = Verdict(
            by_id[held.id], said, held.finished, held.tokens, held.completion or "", held.sample
        )
    if stale:
        aside = path.with_name(f".{path.name}.partial")
        aside.unlink(missing_ok=True)
        append_answers(aside, list(found.values()), text=worded)
        os.replace(aside, path)
    return found


def _said(held: _Row, thinking: bool, formats: Sequence[str]) -> Answer | None:
    if held.completion is not None:
        return parse_answer(held.completion, thinking=thinking, formats=formats)
    level = held.predicted if type(held.predicted) is int and 1 <= held.predicted <= 5 else None
    known = held.reason in get_args(Reason) and (level is not None) == (held.reason == "parsed")
    return Answer(level, held.reason, None) if known and held.predicted == level else None


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of the file; one that a crash tore is cut off."""
    size = 0
    try:
        for line in raw_lines(path, longest=LONGEST_LINE):
            if not line.endswith(b"\n"):
                os.truncate(path, size)
                return
            size += len(line)
            yield line
    except Unreadable as error:
        raise UserError(f"{path}: {error}; {_AFRESH}") from None


_AFRESH = "delete the file to answer its cases again"
