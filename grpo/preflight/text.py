"""The report of `grpo preflight` as text and as JSON, and the explanation of one score."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from grpo.config import Config
from grpo.policy.memory_plan import RunPlan
from grpo.preflight.checks import DataAudit, PreflightInputs, PreflightResult
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control
from grpo.types import Case
from rewards import Overlong, Reward, Rule, Score
from rewards.blind_policies import PolicyReport
from rewards.proof import OUTCOMES, Proof, Row
from rewards.rule_audit import RuleAudit
from rewards.types import LEVELS

WIDTH = 100
SHOWN_IDS = 3
"""Case ids listed in a line before "and N more"."""


def format_report(config: Config, inputs: PreflightInputs, result: PreflightResult) -> str:
    """Return the whole report, at most `WIDTH` columns wide except for counterexamples and reasons."""
    blocks = [
        reward_lines(inputs.reward, result),
        table_lines(result.proof),
        proof_lines(result.proof),
        probe_lines(result.policies, inputs),
        rule_lines(result, inputs),
        data_lines(result.data, inputs),
        plan_lines(config, result.plan),
        verdict_lines(config, result),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def reward_lines(reward: Reward, result: PreflightResult) -> list[str]:
    """The reward, and whether its example cases hold."""
    example_mismatch = result.failing_examples
    examples = f"{len(example_mismatch)} of its example cases fail" if example_mismatch else "its example cases hold"
    return [
        f"reward    {reward.name}: {escape_control(reward.about)}",
        f"          sha256 {reward.sha256[:16]}, {len(reward.rules)} rules, {examples}",
        *(f"          FAILS {escape_control(line)}" for line in example_mismatch),
    ]


def table_lines(proof: Proof) -> list[str]:
    """The table: one row per gold level and combination of triggers; equal rows are merged."""
    names = list(dict.fromkeys(name for row in proof.rows for name in row.triggers))
    tags = {name: chr(ord("a") + i) if i < 26 else f"t{i}" for i, name in enumerate(names)}
    cells: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for row in proof.rows:
        cells.setdefault((row.gold, row.triggers), []).append(_cell(row))
    width = max(7, *(len(cell) + 2 for line in cells.values() for cell in line))
    alike: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for (gold, triggers), line in cells.items():
        alike.setdefault((gold, tuple(line)), []).append("+".join(tags[name] for name in triggers) or "none")
    firing = max(len("triggers"), *(len(_combos(combos)) for combos in alike.values())) + 1
    heads = [
        f"ESI {outcome}" if isinstance(outcome, int) else outcome.replace("truncated", "cut") for outcome in OUTCOMES
    ]
    lines = [
        "table     total by gold level, triggers that fire, and outcome",
        "          cut: truncated before an answer; timeout: a pattern timed out",
    ]
    if proof.overlong:
        lines.append(
            f"          with the overlong penalty: 0 to {format_signed(-proof.overlong.penalty)} in the budget's last "
            f"{proof.overlong.cache:,} tokens"
        )
    lines += [f"          {tag} = {name}" for name, tag in tags.items()]
    lines.append(f"  gold  {'triggers':<{firing}}" + "".join(f"{head:>{max(width, len(head) + 2)}}" for head in heads))
    for (gold, values), combos in alike.items():
        padded = (f"{value:>{max(width, len(head) + 2)}}" for value, head in zip(values, heads, strict=True))
        lines.append(f"  {gold:>4}  {_combos(combos):<{firing}}" + "".join(padded))
    return lines


def _cell(row: Row) -> str:
    return format_signed(row.low) if row.low == row.high else f"{format_signed(row.low)}..{format_signed(row.high)}"


def _combos(combos: list[str]) -> str:
    return ", ".join(combos) if len(combos) <= 3 else f"{combos[0]} … {combos[-1]} ({len(combos)})"


def proof_lines(proof: Proof) -> list[str]:
    """Each invariant with its margin and its closest pair of cells."""
    verdict = f"sound, smallest margin {proof.smallest_margin:+.3g}" if proof.sound else "NOT SOUND"
    lines = [f"proof     {verdict}"]
    for invariant in proof.invariants:
        mark = "holds" if invariant.holds else "FAILS"
        lines.append(f"  {mark}  margin {invariant.margin:>+6.3g}  {invariant.claim}")
        if invariant.better and invariant.worse:
            closest = "closest pair" if invariant.holds else "counterexample"
            lines += [f"         {closest}: {invariant.better}", f"         {'and':>{len(closest)}}: {invariant.worse}"]
    return lines


def probe_lines(report: PolicyReport | None, inputs: PreflightInputs) -> list[str]:
    """The expected reward of every policy on the training stream, the highest first."""
    if report is None:
        if inputs.cases is not None:
            return ["probes    none: patterns time out on too many cases"]
        file_errors = [f"          {escape_control(fault)}" for fault in inputs.file_errors]
        return (
            ["probes    none: no cases", *file_errors]
            if file_errors
            else ["probes    none: --reward-only reads no cases"]
        )
    lines = [
        f"probes    expected reward ± std on {len(inputs.cases or ()):,} training cases, oversampled as configured"
    ]
    for rank, policy in enumerate(report.ranked, 1):
        beats = "  BEATS THE HONEST POLICY" if policy.policy in report.policies_that_beat_honest else ""
        honest = "  <- honest, errors one level off" if policy is report.honest else ""
        lines.append(f"  {rank:>4}  {policy.policy:<28}{policy.mean:>+8.3f} ± {policy.std:.3f}{beats}{honest}")
    return lines


def rule_lines(result: PreflightResult, inputs: PreflightInputs) -> list[str]:
    """How each rule applies to the cases; without cases, only the rules that can have no effect."""
    dead = [f"          {name}: can never change an advantage" for name in result.dead_rules]
    if result.rules is None or inputs.cases is None:
        return ["rules     without effect on any case:", *dead] if dead else []
    if not result.rules:
        return ["rules     none"]
    lines = [f"rules     {'cases to which the rule applies, by gold level':<56}1      2      3      4      5"]
    for audit in result.rules:
        lines.append(f"  {audit.rule:<58}" + "".join(f"{count:>7,}" for count in audit.fires))
        lines += [f"          {note}" for note in _rule_notes(audit, inputs.reward.rule(audit.rule))]
    return lines + dead


def _rule_notes(audit: RuleAudit, rule: Rule) -> list[str]:
    notes = []
    if audit.wordings:
        notes.append("found: " + escape_control(", ".join(f"{word} ({count})" for word, count in audit.wordings[:4])))
    if rule.trigger and (elsewhere := sum(audit.matches) - sum(audit.fires)):
        notes.append(f"the trigger also fires on {elsewhere:,} cases of other gold levels")
    if audit.negated:
        notes.append(f"negated or in the past: {_ids(audit.negated)}")
    if audit.never_fires:
        notes.append("never fires on these cases")
    elif not audit.changes_advantage:
        notes.append("fires, but can never change an advantage here")
    return notes


def data_lines(data: DataAudit | None, inputs: PreflightInputs) -> list[str]:
    """Level counts, repeated texts, and the overlap with the evaluation sets."""
    if data is None:
        return []
    lines = [f"data      {'gold level':<26}1        2        3        4        5"]
    for name, counts in (("cases", data.levels), ("after oversampling", data.stream)):
        shares = "".join(f"{count:>9,}" for count in counts)
        total = sum(counts)
        lines.append(f"          {name:<18}{shares}")
        lines.append(f"          {'':<18}" + "".join(f"{count / total:>9.1%}" for count in counts))
    lines.append(f"          texts that occur more than once: {len(data.duplicates)}")
    if data.contradictions:
        lines.append(
            f"          of them with different gold levels: {_ids(['='.join(g) for g in data.contradictions])}"
        )
    for overlap in data.overlaps:
        if overlap.same_id:
            lines.append(f"          ids also in {overlap.name}: {_ids(overlap.same_id)}")
        if overlap.same_text:
            lines.append(f"          texts also in {overlap.name}: {_ids(['='.join(p) for p in overlap.same_text])}")
    if not data.overlaps and inputs.sets:
        lines.append(f"          no id or text repeats in {', '.join(inputs.sets)}")
    return [*lines, *(f"          NOT CHECKED {escape_control(fault)}" for fault in inputs.file_errors)]


def plan_lines(config: Config, plan: RunPlan) -> list[str]:
    """The sizes of a step and the memory estimate."""
    lines = [
        f"plan      {plan.steps:,} steps × {plan.prompts} prompts × {plan.group_size} completions = "
        f"{plan.completions:,} completions",
        f"          ≤ {plan.max_tokens_per_step:,} sampled tokens per step (budget {config.rollout.max_new_tokens:,}); "
        f"{plan.micro_batches} micro-batches × {plan.inner_epochs} inner epoch(s)",
    ]
    if plan.frozen is None or plan.trained is None:
        return [*lines, f"          {config.model.name}: unknown shape, so no parameter counts and no memory estimate"]
    lines.append(
        f"          {config.model.name}: {plan.frozen:,} parameters frozen, {plan.trained:,} trained "
        f"in {plan.modules} layers"
    )
    for line in plan.memory:
        lines.append(f"  estimate  {line.part:<15}{line.phase:<8}{line.bytes / 1e9:>9.3f} GB   {line.formula}")
    peaks = " GB, ".join(f"{phase} {plan.peak(phase) / 1e9:.2f}" for phase in ("rollout", "update"))
    return [*lines, f"  estimate  together: {peaks} GB"]


def verdict_lines(config: Config, result: PreflightResult) -> list[str]:
    """The verdict with its reasons, and what was not checked."""
    alone = " (only the reward: no cases were read)" if result.data is None and not result.file_errors else ""
    lines = [f"verdict   {result.verdict}{alone}"]
    lines += [f"          - {escape_control(reason)}" for reason in result.problems]
    if config.reward.allow_unsound:
        lines.append(f"          training is allowed anyway: {escape_control(config.reward.unsound_reason)}")
    lines += [f"          dropped: {escape_control(line)}" for line in result.dropped_rows]
    if result.not_checked:
        lines += [f"          not checked: {escape_control(check)}" for check in result.not_checked]
        lines.append("          (--reward-only checks only the reward and the memory plan)")
    return lines


def record(config: Config, result: PreflightResult) -> dict[str, object]:
    """Return the report as a JSON object, without texts of cases; an infinite margin is null."""
    proof = result.proof
    return {
        "reward": {"name": proof.reward, "sha256": proof.sha256, "failing_examples": result.failing_examples},
        "verdict": result.verdict,
        "sound": result.verdict == "SOUND",
        "refusals": result.problems,
        "allowed": config.reward.unsound_reason if config.reward.allow_unsound else None,
        "faults": result.file_errors,
        "left_out": result.dropped_rows,
        "unchecked": result.not_checked,
        "proof": {
            "sound": proof.sound,
            "smallest_margin": proof.smallest_margin,
            "overlong": proof.overlong and asdict(proof.overlong),
            "invariants": [
                {**asdict(i), "holds": i.holds, "margin": i.margin if math.isfinite(i.margin) else None}
                for i in proof.invariants
            ],
            "table": [asdict(row) for row in proof.rows],
        },
        "probes": result.policies
        and {**asdict(result.policies), "beaten_by": result.policies.policies_that_beat_honest},
        "rules": result.rules and [asdict(audit) for audit in result.rules],
        "dead_rules": result.dead_rules,
        "timeouts": result.timeouts and asdict(result.timeouts),
        "data": result.data and asdict(result.data),
        "plan": {
            **asdict(result.plan),
            "completions": result.plan.completions,
            "peak_bytes": {phase: result.plan.peak(phase) for phase in ("rollout", "update")},
        },
    }


def explain(
    inputs: PreflightInputs, case_id: str, completion: str, *, thinking: bool, finished: bool, length: Overlong | None
) -> str:
    """Explain how one completion of a case is scored: the parsed answer, each rule, each part and the total.

    Control characters are escaped. Tokens are not counted: the overlong penalty is 0 for a finished completion, with a
    note, and full for a truncated one.

    Raises:
        UserError: no training or evaluation case has this id.
    """
    case = _find_case(inputs, case_id)
    reward = inputs.reward
    score = reward.score(
        text=case.text,
        gold=case.gold_level,
        completion=completion,
        thinking=thinking,
        finished=finished,
        case_id=case.id,
        length_penalty=-length.penalty if length and not finished else 0.0,
    )
    lines = [
        f"case      {escape_control(case.id)}, gold ESI {case.gold_level}",
        *(f"          {line}" for line in textwrap.wrap(escape_control(case.text), WIDTH - 10)),
        f"prompt    thinking {'on: it opened <think>' if thinking else 'off'}",
        f"answer    {_answer(score, completion)}" + ("" if finished else "; truncated by the token budget"),
    ]
    if score.timed_out:
        lines.append("rules     a pattern timed out: every completion of this case gets the floor")
    else:
        rules = [_explain_rule(reward, rule, case.text, case.gold_level, score) for rule in reward.rules]
        lines += [f"{'rules' if i == 0 else '':<10}{line}" for i, line in enumerate(rules)]
    lines += [
        f"{'parts' if i == 0 else '':<10}{n:<28}{format_signed(v):>7}" for i, (n, v) in enumerate(score.parts.items())
    ]
    if length and finished:
        lines.append(
            f"          overlong: up to {format_signed(-length.penalty)} in the budget's last {length.cache:,} tokens, "
            "which are not counted here"
        )
    return "\n".join([*lines, f"total     {'':<28}{format_signed(score.total):>7}"])


def _find_case(inputs: PreflightInputs, case_id: str) -> Case:
    every = [*(inputs.cases or ()), *(case for members in inputs.sets.values() for case in members)]
    for case in every:
        if case.id == case_id:
            return case
    unread = "".join(f"\nnot read: {fault}" for fault in inputs.file_errors)
    raise UserError(f"no training or evaluation case has the id {case_id!r}; {len(every):,} were read{unread}")


def _answer(score: Score, completion: str) -> str:
    level = "none" if score.answer.level is None else f"ESI {score.answer.level}"
    if score.answer.span is None:
        return f"{level}, {score.answer.reason}"
    begin, end = score.answer.span
    return f'{level}, {score.answer.reason}, from characters {begin}-{end}: "{escape_control(completion[begin:end])}"'


def _explain_rule(reward: Reward, rule: Rule, text: str, gold: int, score: Score) -> str:
    """Explain one rule: its span and value, or the first condition that is not met."""
    if fired := next((match for match in score.fired if match.rule == rule.name), None):
        begin, end = fired.span or (0, 0)
        where = f' on characters {begin}-{end}: "{escape_control(text[begin:end])}"' if fired.span else ""
        part = score.parts[rule.name]
        stacked = "" if part == fired.value else f", {format_signed(part)} after stacking"
        return f"{rule.name} fired{where}: {format_signed(fired.value)}{stacked}"
    if gold not in rule.gold:
        why = f"it applies only to gold {_levels(rule.gold)}"
    elif not reward.applies(rule.name, text, gold):
        why = "its trigger does not fire on this text"
    elif score.answer.level is None:
        why = "there is no answer"
    else:
        why = f"it applies only to answers {_levels(rule.predicted)}"
    return f"{rule.name} does not apply: {why}"


def _levels(levels: frozenset[int]) -> str:
    return "any" if len(levels) == len(LEVELS) else ", ".join(map(str, sorted(levels)))


def _ids(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN_IDS:,} more" if len(ids) > SHOWN_IDS else ""
    return f"{len(ids):,} ({escape_control(', '.join(ids[:SHOWN_IDS]))}{more})"


def format_signed(value: float) -> str:
    """Format with a sign and at most four digits; zero is a plain 0.

    >>> format_signed(-0.5), format_signed(1.0), format_signed(0.0)
    ('-0.5', '+1', '0')
    """
    return f"{value:+.4g}" if value else "0"
