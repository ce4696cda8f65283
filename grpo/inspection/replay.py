"""Recompute recorded steps on the CPU, without model or tokenizer, and compare every value bit for bit.

    texts → answers, rules, rewards → advantages and their parts → token weights → ratio, clip, KL, loss → metrics

The inputs of these formulas (texts, token ids, log-probabilities, entropies, the gradient norm) are protected by a
sha256 alone; `grpo.inspection.recompute_logprobs` recomputes the log-probabilities with the model.
"""

import dataclasses
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from grpo.batch import group_advantages, make_batch
from grpo.config import Config
from grpo.inspection.bit_diff import Difference, array_differences, difference_of, same_bits, short_repr
from grpo.inspection.run_reader import RecordedRun, unindexed_files
from grpo.metrics import (
    TokenTerms,
    advantage_by_component,
    compute_token_terms,
    group_member_pairs,
    step_metrics,
    token_slices,
)
from grpo.run.folder import PACKAGES, nan_to_none
from grpo.run.ledger import TRAINER_ONLY_METRICS, LedgerStep, modified_files, read_step, step_files
from grpo.runtime.errors import UserError
from grpo.scoring import overlong_term, score_groups
from grpo.types import StepRecord
from grpo.update import learning_rate
from rewards import Reward, Score
from rewards.table import score_parts, total

MAX_PRINTED = 20
"""Differences that are printed; ``--json`` contains all of them."""
TIMING_PREFIXES = ("time/", "tokens_per_s/", "roofline/", "memory/")
"""Metrics that depend on the speed and memory of the machine, which cannot be recomputed."""
_THINKING_METRICS = ("completions/opened_thinking", "completions/unclosed_thinking")
TEXT_METRICS: dict[str, tuple[str, ...]] = {
    "full": (),
    "redacted": _THINKING_METRICS,
    "off": (*_THINKING_METRICS, "completions/no_parse/", "reward/timed_out"),
}
"""``ledger.text`` → metrics (or prefixes) that need texts which were not recorded."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of replaying several steps."""

    steps: tuple[int, ...]
    completions: int
    tokens: int
    metrics: int
    """Recomputed metrics per step."""
    texts: tuple[str, ...]
    """Distinct ``ledger.text`` of the steps."""
    differences: tuple[Difference, ...]


def replay(recording: RecordedRun, steps: Sequence[int]) -> ReplayResult:
    """Replay steps with a progress bar. A step whose modified files cannot be read is a difference.

    Raises:
        UserError: a step cannot be read although its files are unmodified.
    """
    differences: list[Difference] = []
    completions, tokens, metrics, texts = 0, 0, 0, []
    for number in tqdm(steps, unit="step", leave=False, disable=None):
        try:
            entry = read_step(recording.run.ledger, number)
        except UserError as error:
            if not modified_files(recording.run.ledger, number):
                raise
            differences.append(Difference(number, str(error), "", "as written", "unreadable"))
            continue
        differences += replay_step(entry, recording.config, recording.reward, recording.logged.get(number))
        completions += entry.rewards.size
        tokens += sum(len(ids) for ids in entry.step.batch.completion_ids)
        recomputed = [name for name in entry.metrics if name != "step" and not is_copied(name, entry.text)]
        metrics = max(metrics, len(recomputed))
        texts.append(entry.text)
    return ReplayResult(tuple(steps), completions, tokens, metrics, tuple(dict.fromkeys(texts)), tuple(differences))


def replay_step(
    entry: LedgerStep, config: Config, reward: Reward, logged_metrics: Mapping[str, Any] | None
) -> list[Difference]:
    """Return every value of a recorded step that differs from the recomputed one; empty for an unmodified record.

    Each stage starts from the recomputed values of the stage before, so a modified reward is one difference and not a
    hundred. One value of an unmodified record can differ: whether a trigger's pattern timed out depends on the clock.

    Args:
        reward: the run's own; if the texts were not recorded, only its table is used.
        logged_metrics: the step's line of ``metrics.jsonl``; None, which is a difference, if there is none.
    """
    number = entry.step.number
    modified = [
        Difference(number, name, "", "as written", "changed since: its sha256 differs") for name in entry.modified_files
    ]
    try:
        scores = rescore(entry, config, reward)
        rewards = np.array([[score.total for score in row] for row in scores])
        batch = make_batch(entry.step.groups, group_advantages(entry.step.groups, rewards, config.advantage), config)
        step = dataclasses.replace(entry.step, scores=scores, batch=batch)
        account = compute_token_terms(step.logprobs, batch, config.loss)
        shares = advantage_by_component(step, config.advantage)
        position = number * config.optim.inner_epochs - 1
        metrics = nan_to_none(step_metrics(step, account, shares, config) | {"lr": learning_rate(config, position)})
        differences = [*_score_differences(entry, scores), *_tensor_differences(entry, step, account, shares)]
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, ArithmeticError) as error:
        # a forged record can contain anything
        reason = f": {error}" if isinstance(error, ValueError) else ""
        return [*modified, Difference(number, "ledger", "", "a step", f"nothing ({type(error).__name__}{reason})")]
    return [*modified, *differences, *_metric_differences(entry, metrics, logged_metrics)]


def rescore(entry: LedgerStep, config: Config, reward: Reward) -> tuple[tuple[Score, ...], ...]:
    """Return [B][G] scores of the recorded texts or, if they were not recorded, of the recorded answers and rules."""
    if entry.text == "full":
        return score_groups(reward, entry.step.groups, config)
    return tuple(
        tuple(
            _recombine(
                score, group.prompt.case.gold_level, len(completion.ids), config, reward, entry.text == "redacted"
            )
            for completion, score in zip(group.completions, row, strict=True)
        )
        for group, row in zip(entry.step.groups, entry.step.scores, strict=True)
    )


def _recombine(score: Score, gold: int, length: int, config: Config, reward: Reward, rules_known: bool) -> Score:
    """Recompute total and parts from the answer and, if recorded, from the rules that fired."""
    parts = dict(score.parts)
    if parts["timeout"] == 0.0 and not score.timed_out:
        error = None if score.answer.level is None else score.answer.level - gold
        stacked = score_parts(reward.table, error, {fired.rule: fired.value for fired in score.fired})
        if rules_known:
            parts = dict.fromkeys(parts, 0.0) | stacked
        else:
            parts |= {name: stacked[name] for name in ("outcome", "no_parse")}
        parts["overlong"] = overlong_term(length, config)
    return dataclasses.replace(score, total=total(parts), parts=parts)


def _score_differences(entry: LedgerStep, scores: Sequence[Sequence[Score]]) -> Iterator[Difference]:
    """Compare answers and rules. If the texts were not recorded, both sides are the record."""
    tensors, lines = (f"ledger/{file.name}" for file in step_files(Path(), entry.step.number))
    for b, g in group_member_pairs(entry.step):
        fields = [
            {
                f"{tensors}: predicted": score.answer.level,
                f"{lines}: reason": score.answer.reason,
                f"{lines}: span": score.answer.span,
                f"{lines}: fired": [(fired.rule, fired.span, fired.value) for fired in score.fired],
                f"{lines}: timed_out": score.timed_out,
            }
            for score in (entry.step.scores[b][g], scores[b][g])
        ]
        for where, logged in fields[0].items():
            replayed = fields[1][where]
            if not same_bits(logged, replayed):
                place = _row_name(entry.step, b, g)
                yield Difference(entry.step.number, where, place, short_repr(logged), short_repr(replayed))


def _tensor_differences(
    entry: LedgerStep, replayed: StepRecord, account: TokenTerms, shares: Mapping[str, np.ndarray]
) -> Iterator[Difference]:
    """Compare all tensors of the step's safetensors file that are not inputs of the replay."""
    by_row = [
        {
            **_columns("components", _parts(step)),
            "rewards": np.array([score.total for row in step.scores for score in row]),
            "in_baseline": step.batch.baseline_mask,
            "advantages": step.batch.advantages,
            **_columns("shares", step_shares),
            "token_weights": step.batch.token_weights[:, 0],
        }
        for step, step_shares in ((entry.step, entry.shares), (replayed, shares))
    ]
    by_token = [
        {"ratio": terms.ratio, "clip": terms.clip_side, "kl": terms.kl, "loss": terms.loss}
        for terms in (entry.account, account)
    ]
    names = [_row_name(entry.step, b, g) for b, g in group_member_pairs(entry.step)]
    row_slices = [slice(row, row + 1) for row in range(len(names))]
    token_places = token_slices([len(ids) for ids in entry.step.batch.completion_ids])
    file = f"ledger/{step_files(Path(), entry.step.number)[0].name}"
    for (logged, recomputed), slices in ((by_row, row_slices), (by_token, token_places)):
        places = list(zip(names, slices, strict=True))
        for name in {**logged, **recomputed}:
            values = logged.get(name), recomputed.get(name)
            yield from array_differences(entry.step.number, f"{file}: {name}", *values, places)


def _columns(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}[{component}]": array.ravel() for component, array in arrays.items()}


def _parts(step: StepRecord) -> dict[str, np.ndarray]:
    """Return component → [N] fp64 parts of the reward."""
    scores = [score for row in step.scores for score in row]
    return {name: np.array([score.parts[name] for score in scores], dtype=np.float64) for name in scores[0].parts}


def _row_name(step: StepRecord, b: int, g: int) -> str:
    case = step.groups[b].prompt.case.id
    return f"group {b}{f' (case {case})' if case else ''}, member {g}"


def _metric_differences(
    entry: LedgerStep, replayed: Mapping[str, Any], line: Mapping[str, Any] | None
) -> Iterator[Difference]:
    """Compare both copies of the metrics: the one in the ledger and the line of ``metrics.jsonl``."""
    number = entry.step.number
    expected = dict(replayed) | {name: entry.metrics.get(name) for name in replayed if is_copied(name, entry.text)}
    copies = {f"ledger/{step_files(Path(), number)[1].name}": entry.metrics}
    if line is None:
        yield Difference(number, "metrics.jsonl", "", "no line", "a step")
    else:
        copies["metrics.jsonl"] = {name: v for name, v in line.items() if not name.startswith(TIMING_PREFIXES)}
    for file, logged in copies.items():
        for name in {**expected, **logged}:
            if name not in expected or name not in logged:
                sides = [short_repr(side[name]) if name in side else "absent" for side in (logged, expected)]
                yield Difference(number, f"{file}: {name}", "", sides[0], sides[1])
            elif not same_bits(logged[name], expected[name]):
                yield difference_of(number, f"{file}: {name}", "", [(logged[name], expected[name])])


def is_copied(metric: str, text: str) -> bool:
    """Return whether a metric cannot be recomputed under this ``ledger.text``: then only its two copies are compared.

    >>> is_copied("grad_norm", "full"), is_copied("reward/mean", "off"), is_copied("completions/no_parse/range", "off")
    (True, False, True)
    """
    return metric in TRAINER_ONLY_METRICS or any(
        metric.startswith(name) if name.endswith("/") else metric == name for name in TEXT_METRICS[text]
    )


def folder_differences(recording: RecordedRun) -> Iterator[Difference]:
    """Yield faults of the run as a whole: another reward, missing steps, steps that were never logged."""
    config, logged, run = recording.config, recording.logged, recording.run
    expected, actual = recording.header.reward["sha256"], recording.reward.sha256
    if actual != expected:
        yield Difference(0, "reward.json", "", f"sha256 {expected[:16]}…", f"sha256 {actual[:16]}…")
    for name in unindexed_files(run.ledger, recording.steps):
        found = "present (was the run killed in this step? use --resume)"
        yield Difference(0, f"ledger/{name}", "", "in no line of index.jsonl", found)
    last, every = max(logged, default=0), config.ledger.every
    yield from _missing_steps("metrics.jsonl", logged, 1, min(last, config.train.steps))
    yield from _missing_steps("ledger/index.jsonl", recording.steps, every, min(last, config.train.steps))
    for step in recording.steps:
        if not every or step % every:
            yield Difference(step, "ledger/index.jsonl", "", "a line", f"none, with ledger.every = {every}")
    finished = run.adapter.is_dir()
    if last > config.train.steps or (finished and last < config.train.steps):
        reason = "train.steps; adapter/ exists, so the run is finished" if finished else "train.steps"
        yield Difference(0, "metrics.jsonl: last step", "", str(last), f"{config.train.steps} ({reason})")


def _missing_steps(file: str, steps: Collection[int], every: int, last: int) -> Iterator[Difference]:
    """Yield one difference if a multiple of ``every`` up to ``last`` has no line in a file."""
    missing = last // every - sum(0 < step <= last and step % every == 0 for step in steps) if every else 0
    if missing:
        first = next(step for step in range(every, last + 1, every) if step not in steps)
        yield Difference(first, file, "", "no line", f"a line; {missing:,} missing up to step {last}")


def environment_changes(recording: RecordedRun) -> dict[str, tuple[Any, str]]:
    """Return name → (at training, now) of each package version and machine property that changed."""
    now = {name: version(name) for name in PACKAGES}
    now |= {"python": platform.python_version(), "platform": platform.platform(), "processor": platform.processor()}
    then = recording.made_with
    return {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}


def not_checked(recording: RecordedRun, result: ReplayResult) -> list[str]:
    """Return what this replay, unlike one of a complete run with texts, cannot verify, one line each."""
    logged, config = recording.logged, recording.config
    unrecorded, last = sum(step not in recording.steps for step in logged), max(logged, default=0)
    lines = [
        f'answers and rules: taken as recorded (ledger.text = "{text}"); {", ".join(TEXT_METRICS[text])}: only the two '
        "copies are compared"
        for text in result.texts
        if text != "full"
    ]
    if unrecorded:
        every = config.ledger.every
        lines.append(f"{unrecorded:,} of {len(logged):,} steps: in metrics.jsonl alone (ledger.every = {every})")
    if 0 < last < config.train.steps:
        lines.append(f"steps after {last} of {config.train.steps}: not trained yet")
    return lines


def verdict(result: ReplayResult, differences: Sequence[Difference], seconds: float) -> str:
    """Return the last line of a replay's output."""
    steps = f"{len(result.steps):,} step{'s' * (len(result.steps) != 1)}"
    values = f"every reward, advantage, loss term and {result.metrics} metrics equal, bit for bit"
    if differences:
        values = f"{len(differences):,} difference{'s' * (len(differences) != 1)}"
    return f"replayed {steps}, {result.completions:,} completions, {result.tokens:,} tokens: {values} ({seconds:.1f} s)"


def replay_lines(recording: RecordedRun, result: ReplayResult, differences: Sequence[Difference]) -> list[str]:
    """Format a replay's output except for its verdict."""
    lines = [str(difference) for difference in differences[:MAX_PRINTED]]
    if len(differences) > MAX_PRINTED:
        lines.append(f"and {len(differences) - MAX_PRINTED:,} more: see --json")
    changes = environment_changes(recording).items()
    if differences and changes:
        texts = (f"{name} {then} → {now}" for name, (then, now) in changes)
        lines.append(f"changed since the training: {'; '.join(texts)}")
    return [*lines, *(f"not checked  {line}" for line in not_checked(recording, result))]
