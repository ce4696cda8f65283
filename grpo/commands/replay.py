"""Does a run say what it did? ``python -m grpo replay RUN``.

Every recorded step is done again from its ledger, on the CPU, without model or tokenizer:

    texts → answers, rules, rewards → advantages and their parts → token weights → ratio, clip, KL, loss → metrics

and every value is held against what was written down, bit for bit. What those formulas start from (texts, token ids,
log-probabilities, entropies, the gradient's norm) is guarded by a sha256 alone; ``--model`` computes the
log-probabilities again. Exit codes: 0 equal, 1 different, 2 unreadable.
"""

import argparse
import dataclasses
import json
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from grpo.batch import group_advantages, make_batch
from grpo.config import Config
from grpo.inspection.bit_diff import Difference, array_differences, same, scalar_difference, shown
from grpo.inspection.counterfactual import change_lines, counterfactual, step_lines, summary_lines
from grpo.inspection.run_reader import Recording, read_recording, rewritten_lines, torn, unindexed_files
from grpo.metrics import TokenAccount, advantage_shares, rows, step_metrics, token_account, token_slices
from grpo.policy.base_model import device_option
from grpo.run.folder import PACKAGES, finite
from grpo.run.ledger import FIGURES, Entry, LedgerChanged, read_step, step_files
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.terminal import error_lines, say_anyhow, visible
from grpo.scoring import length_penalty, score_groups
from grpo.types import Step
from grpo.update import learning_rate
from rewards import Reward, Score, load_reward
from rewards.table import combine, total

SHOWN = 20
"""Differences that are printed; ``--json`` gives all."""
FEW_ULPS = 64
"""Up to here a difference looks like the rounding of another library or processor."""
MACHINE = ("time/", "tokens_per_s/", "roofline/", "memory/")
"""Metrics of ``metrics.jsonl`` that say how fast the machine was: there is nothing to compute them from."""
PHASES = ("rollout", "update", "account")
"""Of a step, as `grpo.train` times them."""
COPIES = FIGURES
"""Metrics that only the training could compute: the ledger's copy is held against that of ``metrics.jsonl``."""
_THOUGHTS = ("completions/opened_thinking", "completions/unclosed_thinking")
UNSEEN: dict[str, tuple[str, ...]] = {
    "full": (),
    "redacted": _THOUGHTS,
    "off": (*_THOUGHTS, "completions/no_parse/", "reward/timed_out"),
}
"""``ledger.text`` → metrics, or how their names begin, that need what was not written: copy against copy too."""
UNREAD = {
    "redacted": "texts: not written down (ledger.text); answers and fired rules are taken as recorded",
    "off": "texts and rules: not written down (ledger.text); answers and what rules gave are taken as recorded",
}


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found."""

    steps: tuple[int, ...]
    completions: int
    tokens: int
    metrics: int
    """Distinct names that were computed again."""
    texts: tuple[str, ...]
    """The ``ledger.text`` of the steps, each once."""
    differences: tuple[Difference, ...]


def replay_step(
    entry: Entry, config: Config, reward: Reward, logged_metrics: Mapping[str, Any] | None
) -> list[Difference]:
    """Everything in which a recorded step differs from what follows of it: [] for an honest record.

    Each stage is computed from the replayed values of the stage before, so an altered reward is one difference and
    not a hundred. One thing can differ in honesty: a trigger's pattern that ran out of time is judged by the clock.

    Args:
        entry: as `grpo.run.ledger.read_step` gives it.
        reward: the run's own; with ``ledger.text`` other than "full" only its table is used.
        logged_metrics: the step's line of ``metrics.jsonl``; None if it has none, which is a difference.
    """
    number = entry.step.number
    found = [Difference(number, name, "", "as written", "changed since: its sha256 differs") for name in entry.changed]
    try:
        scores = replayed_scores(entry, config, reward)
        found += _score_differences(entry, scores)
        rewards = np.array([[score.total for score in row] for row in scores])
        batch = make_batch(entry.step.groups, group_advantages(entry.step.groups, rewards, config.advantage), config)
        again = dataclasses.replace(entry.step, scores=scores, batch=batch)
        account = token_account(again.tokens, batch, config.loss)
        shares = advantage_shares(again, config.advantage)
        found += _tensor_differences(entry, again, account, shares)
        position = number * config.optim.inner_epochs - 1
        metrics = finite(step_metrics(again, account, shares, config) | {"lr": learning_rate(config, position)})
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, ArithmeticError) as error:
        # a record that was tampered with can be anything at all
        why = f": {error}" if isinstance(error, ValueError) else ""
        return [*found, Difference(number, "ledger", "", "a step", f"nothing ({type(error).__name__}{why})")]
    return [*found, *_metric_differences(entry, metrics, logged_metrics)]


def replayed_scores(entry: Entry, config: Config, reward: Reward) -> tuple[tuple[Score, ...], ...]:
    """[B][G] scores: of the recorded texts, or, where those were not written, of the recorded answers and rules."""
    if entry.text == "full":
        return score_groups(reward, entry.step.groups, config)
    return tuple(
        tuple(
            _recombined(score, group.prompt.case.esi, len(completion.ids), config, reward, entry.text == "redacted")
            for completion, score in zip(group.completions, row, strict=True)
        )
        for group, row in zip(entry.step.groups, entry.step.scores, strict=True)
    )


def _recombined(score: Score, gold: int, length: int, config: Config, reward: Reward, rules_known: bool) -> Score:
    """The total and its parts from the answer and, if they were written, the rules that fired."""
    parts = dict(score.parts)
    if parts["timeout"] == 0.0 and not score.timed_out:
        error = None if score.answer.level is None else score.answer.level - gold
        stacked = combine(reward.table, error, {fired.rule: fired.value for fired in score.fired})
        if not rules_known:
            stacked = {name: stacked[name] for name in ("outcome", "no_parse")}
        parts = (dict.fromkeys(parts, 0.0) if rules_known else parts) | stacked
        parts["overlong"] = length_penalty(length, config)
    return dataclasses.replace(score, total=total(parts), parts=parts)


def _score_differences(entry: Entry, scores: Sequence[Sequence[Score]]) -> Iterator[Difference]:
    """Answers and rules of each completion; where they were not found again both sides are the record."""
    tensors, lines = (f"ledger/{file.name}" for file in step_files(Path(), entry.step.number))
    for b, g in rows(entry.step):
        logged, replayed = entry.step.scores[b][g], scores[b][g]
        fields: dict[str, tuple[Any, Any]] = {
            f"{tensors}: predicted": (logged.answer.level, replayed.answer.level),
            f"{lines}: reason": (logged.answer.reason, replayed.answer.reason),
            f"{lines}: span": (logged.answer.span, replayed.answer.span),
            f"{lines}: fired": (_fired(logged), _fired(replayed)),
            f"{lines}: timed_out": (logged.timed_out, replayed.timed_out),
        }
        for where, (a, z) in fields.items():
            if not same(a, z):
                yield Difference(entry.step.number, where, _place(entry.step, b, g), shown(a), shown(z))


def _fired(score: Score) -> list[tuple[Any, ...]]:
    return [(fired.rule, fired.span, fired.value) for fired in score.fired]


def _tensor_differences(
    entry: Entry, again: Step, account: TokenAccount, shares: Mapping[str, np.ndarray]
) -> Iterator[Difference]:
    """Of everything that the step's safetensors file holds beside what the replay started from."""
    logged = entry.step
    parts = [_columns(step) for step in (logged, again)]
    split = [{name: share.ravel() for name, share in side.items()} for side in (entry.shares, shares)]
    by_row: dict[str, tuple[Any, Any]] = {
        **{f"components[{name}]": _pair(parts, name) for name in {**parts[0], **parts[1]}},
        "rewards": (entry.rewards.ravel(), np.array([score.total for row in again.scores for score in row])),
        "in_baseline": (logged.batch.in_baseline, again.batch.in_baseline),
        "advantages": (logged.batch.advantages, again.batch.advantages),
        **{f"shares[{name}]": _pair(split, name) for name in {**split[0], **split[1]}},
        "token_weights": (logged.batch.token_weights[:, 0], again.batch.token_weights[:, 0]),
    }
    by_token = {name: (getattr(entry.account, name), getattr(account, name)) for name in TokenAccount.__slots__}
    names = [_place(logged, b, g) for b, g in rows(logged)]
    whole_rows = [slice(row, row + 1) for row in range(len(names))]
    spans = token_slices([len(ids) for ids in logged.batch.completion_ids])
    file = f"ledger/{step_files(Path(), logged.number)[0].name}"
    for tensors, stretches in ((by_row, whole_rows), (by_token, spans)):
        places = list(zip(names, stretches, strict=True))
        for tensor, (then, now) in tensors.items():
            yield from array_differences(logged.number, f"{file}: {tensor}", then, now, places)


def _pair(sides: Sequence[Mapping[str, np.ndarray]], name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    return sides[0].get(name), sides[1].get(name)


def _columns(step: Step) -> dict[str, np.ndarray]:
    """Component → [N] fp64."""
    flat = [score for row in step.scores for score in row]
    return {name: np.array([score.parts[name] for score in flat], dtype=np.float64) for name in flat[0].parts}


def _place(step: Step, b: int, g: int) -> str:
    case = step.groups[b].prompt.case.id
    return f"group {b}{f' (case {case})' if case else ''}, member {g}"


def _metric_differences(
    entry: Entry, replayed: Mapping[str, Any], line: Mapping[str, Any] | None
) -> Iterator[Difference]:
    """Of both copies: the ledger's and that of ``metrics.jsonl``."""
    number, copy = entry.step.number, entry.metrics
    truth = dict(replayed) | {name: copy.get(name) for name in replayed if is_copied(name, entry.text)}
    where = {f"ledger/{step_files(Path(), number)[1].name}": copy}
    if line is None:
        yield Difference(number, "metrics.jsonl", "", "no line", "a step")
    else:
        where["metrics.jsonl"] = {name: value for name, value in line.items() if not name.startswith(MACHINE)}
        yield from _speed_differences(entry.step, line)
    for file, logged in where.items():
        for name in {**truth, **logged}:
            if name not in truth or name not in logged:
                said, meant = (shown(values[name]) if name in values else "absent" for values in (logged, truth))
                yield Difference(number, f"{file}: {name}", "", said, meant)
            elif not same(logged[name], truth[name]):
                yield scalar_difference(number, f"{file}: {name}", logged[name], truth[name])


def _speed_differences(step: Step, line: Mapping[str, Any]) -> Iterator[Difference]:
    """Of the throughput, which follows from the tokens and the seconds that stand beside it."""
    tokens = sum(len(ids) for ids in step.batch.completion_ids) + sum(sum(one.lengths) for one in step.dropped)
    seconds = [line.get(f"time/{name}_s") for name in PHASES]
    if not all(isinstance(value, float) and value > 0 for value in seconds):
        yield Difference(step.number, "metrics.jsonl: time/", "", shown(seconds), f"seconds of {', '.join(PHASES)}")
        return
    rollout, *_ = numbers = [float(value) for value in seconds if value]
    truth = {"rollout": tokens / rollout, "step": tokens / sum(numbers)}
    for name, value in truth.items():
        if not same(line.get(f"tokens_per_s/{name}"), value):
            said = shown(line.get(f"tokens_per_s/{name}"))
            yield Difference(step.number, f"metrics.jsonl: tokens_per_s/{name}", "", said, shown(value))


def is_copied(metric: str, text: str) -> bool:
    """Whether only the two copies of a metric can be held against each other, under this ``ledger.text``.

    >>> is_copied("grad_norm", "full"), is_copied("reward/mean", "off"), is_copied("completions/no_parse/range", "off")
    (True, False, True)
    """
    return metric in COPIES or any(
        metric.startswith(name) if name.endswith("/") else metric == name for name in UNSEEN[text]
    )


def folder_differences(recording: Recording) -> Iterator[Difference]:
    """What is wrong with the run as a whole: another reward, steps that are missing or that nobody logged."""
    config, logged, steps = recording.config, recording.logged, recording.steps
    index, every = "ledger/index.jsonl", config.ledger.every
    if recording.reward.sha256 != recording.reward_sha256:
        then, now = (f"sha256 {value[:16]}…" for value in (recording.reward_sha256, recording.reward.sha256))
        yield Difference(0, "reward.json", "", then, now)
    for line in rewritten_lines(recording.run.ledger):
        yield Difference(0, f"{index}:{line}", "", "as written", "changed since: spelled as no run spells it")
    for name in unindexed_files(recording.run.ledger, steps):
        yield Difference(0, f"ledger/{name}", "", "in no line of index.jsonl", "there (killed in this step? --resume)")
    last = max(logged, default=0)
    until = min(last, config.train.steps)
    for first, end in gaps(logged, until):
        yield Difference(first, "metrics.jsonl", _up_to(first, end), "no line", f"one, as for step {last}")
    for first, end in gaps([step // every for step in steps if not step % every], until // every) if every else ():
        wanted = f"one, with ledger.every = {every}"
        yield Difference(first * every, index, _up_to(first * every, end * every), "no record", wanted)
    for step in steps:
        if not every or step % every:
            yield Difference(step, index, "", "a record", f"none, with ledger.every = {every}")
    finished = recording.run.adapter.is_dir()
    for file in (recording.run.metrics, recording.run.ledger / "index.jsonl"):
        if finished and torn(file):
            yield Difference(0, file.name, "", "whole lines", "a torn last line, in a finished run")
    if last > config.train.steps or (finished and last < config.train.steps):
        why = "train.steps; adapter/ is there, so the run is finished" if finished else "train.steps"
        yield Difference(0, "metrics.jsonl: last step", "", str(last), f"{config.train.steps} ({why})")


def gaps(there: Iterable[int], last: int) -> Iterator[tuple[int, int]]:
    """The stretches of 1 … ``last`` that are not there, first and last of each.

    >>> list(gaps([2, 3, 6], 8))
    [(1, 1), (4, 5), (7, 8)]
    """
    before = 0
    for one in sorted({*(one for one in there if 1 <= one <= last), last + 1}):
        if one > before + 1:
            yield before + 1, one - 1
        before = one


def _up_to(first: int, end: int) -> str:
    return f"to step {end}" if end > first else ""


def replay(recording: Recording, steps: Sequence[int]) -> Replayed:
    """These steps replayed, with a bar on a terminal. A step whose changed files cannot be read is a difference.

    Raises `UserError` for a step that cannot be read although its files are those that were written.
    """
    found: list[Difference] = []
    completions, tokens, metrics, texts = 0, 0, 0, []
    for number in tqdm(steps, unit="step", leave=False, disable=None):
        try:
            entry = read_step(recording.run.ledger, number)
        except LedgerChanged as error:
            found.append(Difference(number, str(error), "", "as written", "unreadable"))
            continue
        found += replay_step(entry, recording.config, recording.reward, recording.logged.get(number))
        completions += entry.rewards.size
        tokens += sum(len(ids) for ids in entry.step.batch.completion_ids)
        metrics = max(metrics, sum(not is_copied(name, entry.text) for name in entry.metrics) - 1)  # "step" is none
        texts.append(entry.text)
    return Replayed(tuple(steps), completions, tokens, metrics, tuple(dict.fromkeys(texts)), tuple(found))


def elsewhere(made_with: Mapping[str, str | None]) -> dict[str, tuple[str | None, str]]:
    """What is not as it was at the training: name → (then, now), of the machine and of what computes."""
    now = {name: version(name) for name in PACKAGES}
    now |= {"python": platform.python_version(), "platform": platform.platform(), "processor": platform.processor()}
    return {name: (made_with[name], now[name]) for name in now if name in made_with and made_with[name] != now[name]}


def not_checked(recording: Recording, replayed: Replayed) -> list[str]:
    """What no replay of this run can say, one line each."""
    logged, config = recording.logged, recording.config
    alone, last = sum(step not in recording.steps for step in logged), max(logged, default=0)
    return [
        f"{', '.join(MACHINE)}: how fast the machine was; {', '.join(COPIES)}: copy against copy",
        "texts, token ids, case ids, log-probabilities, entropies: what all else follows from, by sha256 alone"
        " (--model computes the log-probabilities again); config.json: taken as it is",
        *(f"{UNREAD[text]}; {', '.join(UNSEEN[text])}: copy against copy" for text in replayed.texts if text != "full"),
        *(
            [f"{alone:,} of {len(logged):,} steps: in metrics.jsonl alone (ledger.every = {config.ledger.every})"]
            * bool(alone)
        ),
        *([f"steps after {last} of {config.train.steps}: not made yet"] * (0 < last < config.train.steps)),
    ]


def likely_reason(differences: Sequence[Difference], apart: Mapping[str, tuple[str | None, str]]) -> str | None:
    """Rounding, if nothing is farther apart than `FEW_ULPS` and the replay runs elsewhere than the training did."""
    far = [one.ulps for one in differences]
    if not far or not apart or any(ulps is None or ulps > FEW_ULPS for ulps in far):
        return None
    changes = "; ".join(f"{name} {then} → {now}" for name, (then, now) in apart.items())
    return (
        f"nothing is more than {max(ulps for ulps in far if ulps is not None)} ulp apart and this is not where the run "
        f"was made ({changes}): the rounding of another library or processor is the likely reason"
    )


def verdict(replayed: Replayed, differences: Sequence[Difference], seconds: float) -> str:
    """The last line."""
    count = len(replayed.steps)
    extent = (
        f"replayed {count:,} step{'s' * (count != 1)}, {replayed.completions:,} completions, {replayed.tokens:,} tokens"
    )
    if not differences:
        return (
            f"{extent}: every reward, advantage, loss term and {replayed.metrics} metrics equal, bit for bit "
            f"({seconds:.1f} s)"
        )
    steps = sorted({one.step for one in differences if one.step})
    where = (
        f" in step{'s' * (len(steps) != 1)} {', '.join(map(str, steps[:8]))}{', …' * (len(steps) > 8)}" if steps else ""
    )
    return f"{extent}: {len(differences):,} difference{'s' * (len(differences) != 1)}{where} ({seconds:.1f} s)"


def replay_lines(recording: Recording, replayed: Replayed, differences: Sequence[Difference]) -> list[str]:
    """What a replay found, but for its verdict."""
    lines = [str(one) for one in differences[:SHOWN]]
    if len(differences) > SHOWN:
        by_file = Counter(one.where.partition(":")[0] for one in differences[SHOWN:])
        rest = ", ".join(f"{count:,} in {file}" for file, count in by_file.most_common(4))
        lines.append(f"and {len(differences) - SHOWN:,} more: {rest}{', …' * (len(by_file) > 4)}")
    if reason := likely_reason(differences, elsewhere(recording.made_with)):
        lines.append(reason)
    return [*lines, *(f"not checked  {line}" for line in not_checked(recording, replayed))]


def chosen_steps(recording: Recording, step: int | None) -> tuple[int, ...]:
    """The steps to look at: all of the ledger's, or the one asked for. Raises `UserError` if it is not there."""
    if step is None:
        return recording.steps
    if step not in recording.steps:
        held = f"{recording.steps[0]} to {recording.steps[-1]}" if recording.steps else "none"
        raise UserError(f"{recording.run.ledger}: no step {step} in this ledger: it holds {held}")
    return (step,)


def replayed_run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], int]:
    """A replay as one JSON value, as lines for people, and its exit code."""
    started = time.perf_counter()
    recording = read_recording(arguments.run)
    steps = chosen_steps(recording, arguments.step)
    replayed = replay(recording, steps)
    around = [one for one in folder_differences(recording) if arguments.step is None or one.step in (0, arguments.step)]
    differences = [*around, *replayed.differences]
    lines = replay_lines(recording, replayed, differences)
    record: dict[str, Any] = {
        "run": str(arguments.run),
        "equal": not differences,
        **{name: getattr(replayed, name) for name in ("steps", "completions", "tokens", "metrics")},
        "differences": [dataclasses.asdict(one) for one in differences],
        "not_checked": not_checked(recording, replayed),
        "made_with": dict(recording.made_with),
        "elsewhere": elsewhere(recording.made_with),
    }
    if arguments.model:
        from grpo.inspection.recompute_logprobs import model_lines, on_device, recompute, rounding_causes, tolerance

        section = on_device(recording, arguments.device)
        found = tuple(recompute(recording, steps, section))
        dtype, allowed = tolerance(recording, section)
        record["model"] = {
            "device": section.device,
            "dtype": dtype,
            "rounding_causes": (causes := rounding_causes(recording, section)),
            "tolerance": dict(zip(("largest", "mean"), allowed, strict=True)),
            "steps": [dataclasses.asdict(one) for one in found],
        }
        record["equal"] &= all(one.within(allowed) for one in found)
        lines += model_lines(found, dtype, allowed, recording.config.optim.inner_epochs, causes)
    seconds = time.perf_counter() - started
    last = verdict(replayed, differences, seconds)
    if not record["equal"] and not differences:
        last = "the record follows from itself, but not from the model: see above"
    return record | {"seconds": seconds}, [*lines, last], int(not record["equal"])


def other_reward(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], int]:
    """The steps under another reward as one JSON value, as lines for people, and the exit code: 1 if its files
    are not those that were written."""
    recording = read_recording(arguments.run)
    steps = chosen_steps(recording, arguments.step)
    other = load_reward(arguments.reward)
    found = []
    changed: list[str] = []
    for number in tqdm(steps, unit="step", leave=False, disable=None):
        entry = read_step(recording.run.ledger, number)
        changed += [f"{name}: changed since it was written: its sha256 differs" for name in entry.changed]
        found.append(counterfactual(entry, recording.config, other))
    lines = [*changed] + [line for one in found for line in (step_lines(one) if len(found) == 1 else change_lines(one))]
    record = {
        "run": str(arguments.run),
        "rewards": {"now": recording.reward.name, "then": other.name},
        "changed": changed,
        "steps": [dataclasses.asdict(one) | {"flips": one.flips} for one in found],
    }
    return record, [*lines, *summary_lines(found, recording.reward.name, other.name)], int(bool(changed))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m grpo replay",
        description="Compute a run again from its ledger and hold every value against what was logged.",
        epilog="Exit codes: 0 equal, 1 different, 2 unreadable.",
    )
    made.add_argument("run", type=Path, help="a run folder, for example runs/tiny")
    made.add_argument("--step", type=int, help="this step alone")
    ways = made.add_mutually_exclusive_group()
    ways.add_argument("--reward", metavar="SET", help="instead: the advantages under another reward, a name or a TOML")
    ways.add_argument("--model", action="store_true", help="also compute the log-probabilities again")
    made.add_argument("--device", type=device_option, help="of --model: auto, cpu, cuda, cuda:1 (default: the run's)")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    arguments = parser().parse_args(argv)
    try:
        record, lines, code = (other_reward if arguments.reward else replayed_run)(arguments)
    except INPUT_ERRORS as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        print(error_lines(error), file=sys.stderr)
        return 2
    print(json.dumps(record) if arguments.json else "\n".join(visible(line) for line in lines))
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that closes early is no error
    sys.exit(main())
