"""Cases → judged answers, with the token budget and temperature of ``[evaluate]``, and the files that store them.

The sampling noise of an answer depends on the seed, the set, the mode, the case and the sample index, never on the
training step, the batch or earlier answers: two evaluations differ only by the policy.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo.cases import stable_seed
from grpo.config import Config
from grpo.evaluation.metrics import JudgedAnswer, answer_row
from grpo.policy.policy import Policy
from grpo.prompts import render_prompt
from grpo.rollout import check_length, rollout
from grpo.runtime.atomic_files import append_line_synced, write_atomic
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import EVALUATION, memory_errors
from grpo.types import Case, Prompt
from rewards import Answer, parse_answer
from rewards.parse import FORMATS
from rewards.safe_files import MEBIBYTE, InvalidFile, is_regular, iter_lines, shorten
from rewards.types import Reason

MAX_LINE_BYTES = 64 * MEBIBYTE
"""One line contains the whole text of an answer."""
START_OVER_HINT = "delete the file to answer its cases again"
StoredAnswers = Mapping[tuple[str, int], JudgedAnswer]
"""(case id, sample) → its answer."""


def evaluate(
    policy: Policy,
    cases: Sequence[Case],
    config: Config,
    *,
    name: str,
    thinking: bool,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[JudgedAnswer, ...]:
    """Return one judged answer per case, in the order of the cases (see `answer`). Each rank answers its slice.

    Args:
        progress: called with the number of cases just answered, on all ranks together.
    """
    ranks = policy.world
    rank_slice = ranks.slice_of(len(cases))
    answers: list[JudgedAnswer] = []
    with memory_errors("evaluation", EVALUATION, ranks):
        for batch in answer(policy, [cases[i] for i in rank_slice], config, name=name, thinking=thinking):
            answers += batch
            progress(len(batch) * len(cases) // len(rank_slice))
    return in_order(ranks.all_gather(answers), cases)


def answer(
    policy: Policy,
    cases: Sequence[Case],
    config: Config,
    *,
    name: str,
    thinking: bool,
    samples: int = 1,
    formats: Sequence[str] = tuple(FORMATS),
    stored: StoredAnswers | None = None,
) -> Iterator[tuple[JudgedAnswer, ...]]:
    """Sample and judge ``samples`` answers per case; yield, for each batch, the answers that are not ``stored``.

    Batches are formed from all answers, stored or not, and a batch with a missing answer is decoded completely, so that
    a resumed evaluation gives the same bits as an uninterrupted one.

    Args:
        name: name of the set; part of the sampling key.
        thinking: the chat template's switch.
        samples: answers per case; the first does not depend on their number.
        formats: accepted answer formats, see `rewards.parse.FORMATS`.
        stored: answers that need not be sampled again.

    Raises:
        UserError: a case does not fit the model's context; raised before the first answer.
    """
    prompts = [
        render_prompt(policy.tokenizer, c, system_prompt=config.cases.system_prompt, thinking=thinking) for c in cases
    ]
    for prompt in prompts:
        check_length(policy, prompt, config.evaluate.max_new_tokens)
    prompts.sort(key=lambda prompt: (len(prompt.ids), prompt.case.id))
    members = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    size = config.evaluate.batch_size
    for start in range(0, len(members), size):
        batch = members[start : start + size]
        missing = {(prompt.case.id, sample) for prompt, sample in batch} - (stored or {}).keys()
        if missing:
            key = partial(sampling_key, config.train.seed, name, thinking)
            answers = _decode_batch(policy, batch, config, key, formats)
            yield tuple(a for a in answers if (a.case.id, a.sample) in missing)


def _decode_batch(
    policy: Policy,
    batch: Sequence[tuple[Prompt, int]],
    config: Config,
    key: Callable[[str, int], int],
    formats: Sequence[str],
) -> Iterator[JudgedAnswer]:
    """Yield the answers of one batch of (prompt, sample); the samples of a prompt share its prefill."""
    rows = [(prompt, [sample for _, sample in same]) for prompt, same in groupby(batch, key=lambda item: item[0])]
    groups = rollout(
        policy,
        [prompt for prompt, _ in rows],
        [[key(prompt.case.id, sample) for sample in samples] for prompt, samples in rows],
        max_new_tokens=config.evaluate.max_new_tokens,
        temperature=config.evaluate.temperature,
    )
    for group, (prompt, samples) in zip(groups, rows, strict=True):
        for completion, sample in zip(group.completions, samples, strict=True):
            parsed = parse_answer(completion.text, thinking=prompt.thinking, formats=formats)
            yield JudgedAnswer(prompt.case, parsed, completion.finished, len(completion.ids), completion.text, sample)


def sampling_key(seed: int, name: str, thinking: bool, case_id: str, sample: int) -> int:
    """Return the noise key of one answer. The first sample has the key of an evaluation during training.

    >>> sampling_key(42, "test", True, "c1", 0) == stable_seed("evaluate", 42, "test", "True", "c1")
    True
    """
    return stable_seed("evaluate", seed, name, str(thinking), case_id, *([sample] if sample else []))


def in_order(answers: Sequence[JudgedAnswer], cases: Sequence[Case]) -> tuple[JudgedAnswer, ...]:
    """Return the answers in the order of the cases and of their samples."""
    position = {case.id: i for i, case in enumerate(cases)}
    return tuple(sorted(answers, key=lambda answer: (position[answer.case.id], answer.sample)))


def answer_lines(answers: Sequence[JudgedAnswer], *, text: bool) -> str:
    """Return the answers as JSONL.

    Args:
        text: whether to include the answers' texts.
    """
    return "".join(json.dumps(answer_row(answer, text=text)) + "\n" for answer in answers)


def append_answers(path: Path, answers: Sequence[JudgedAnswer], *, text: bool = True) -> None:
    """Append at least one answer to a file, synced to the disk."""
    append_line_synced(path, answer_lines(answers, text=text).removesuffix("\n"))


class _StoredRow(BaseModel):
    """A line written by `answer_lines`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    id: str
    sample: Annotated[int, Field(ge=0)]
    predicted: Any = None
    reason: Any = None
    finished: bool
    tokens: Annotated[int, Field(ge=1)]
    completion: str | None = None
    """None if texts are not recorded."""


def read_answers(
    path: Path, cases: Sequence[Case], samples: int, *, thinking: bool, formats: Sequence[str] = tuple(FORMATS)
) -> dict[tuple[str, int], JudgedAnswer]:
    """Read a file of answers; no file is no answers. A last line torn by a crash is removed from the file.

    Every text is parsed again, since the recorded level may come from another program's parser or an edit. If a level
    differs, the file is rewritten.

    Args:
        thinking: whether the prompts ended inside an open ``<think>``.

    Raises:
        UserError: a line is not an answer to one of the cases, or its answer occurs twice.
    """
    if not is_regular(path):
        return {}
    by_id = {case.id: case for case in cases}
    answers: dict[tuple[str, int], JudgedAnswer] = {}
    outdated, with_text = False, True
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            row = _StoredRow.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False, include_context=False)[0]
            key = ".".join(str(part) for part in fault["loc"]) or "the line"
            raise UserError(f"{path}:{number}: {key}: {fault['type']}: not an answer; {START_OVER_HINT}") from None
        if row.id not in by_id or row.sample >= samples or (row.id, row.sample) in answers:
            place = f"case {shorten(row.id)}, sample {row.sample}"
            raise UserError(f"{path}:{number}: {place}: not in this evaluation, or twice; {START_OVER_HINT}")
        parsed = _parse_row(row, thinking, formats)
        if parsed is None:
            raise UserError(f"{path}:{number}: neither a completion nor a valid level and reason; {START_OVER_HINT}")
        outdated |= (row.predicted, row.reason) != (parsed.level, parsed.reason)
        with_text &= row.completion is not None
        answers[row.id, row.sample] = JudgedAnswer(
            by_id[row.id], parsed, row.finished, row.tokens, row.completion or "", row.sample
        )
    if outdated:
        write_atomic(path, answer_lines(list(answers.values()), text=with_text))
    return answers


def _parse_row(row: _StoredRow, thinking: bool, formats: Sequence[str]) -> Answer | None:
    """Return the answer in the row's text; without a text the recorded one, or None if that is impossible."""
    if row.completion is not None:
        return parse_answer(row.completion, thinking=thinking, formats=formats)
    is_level = type(row.predicted) is int and 1 <= row.predicted <= 5
    if row.reason not in get_args(Reason) or not (is_level if row.reason == "parsed" else row.predicted is None):
        return None
    return Answer(row.predicted, row.reason, None)


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; truncate the file if its last line has no end."""
    size = 0
    try:
        for line in iter_lines(path, longest=MAX_LINE_BYTES):
            if not line.endswith(b"\n"):
                os.truncate(path, size)
                return
            size += len(line)
            yield line
    except InvalidFile as error:
        raise UserError(f"{path}: {error}; {START_OVER_HINT}") from None
