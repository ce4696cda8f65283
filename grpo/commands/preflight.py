"""Prove the reward before a GPU is rented: ``python -m grpo preflight configs/v49.toml``.

Prints the whole reward table with the margin of each invariant, what blind policies earn on the run's own cases, how
the rules and the cases look, and the plan; with ``--explain`` the reward of one completion, part by part. Imports no
torch. Exit codes: 0 sound, 1 unsound, 2 bad input: a command line, config or reward that cannot be used, or a case file
that cannot be read (what could be examined is still printed, and the verdict says INCOMPLETE where nothing else is
wrong). With ``--json``, bad input prints ``{"error": "..."}``; only a command line that argparse refuses prints usage.
"""

import argparse
import json
import math
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from grpo.config import Config, load_config
from grpo.policy.memory_plan import Plan
from grpo.preflight.checks import HONEST, DataAudit, Examination, Material, examine, gather, length_term
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import error_lines, say_anyhow, visible
from grpo.types import Case
from rewards import Overlong, Reward, RewardError, Rule, Score
from rewards.blind_policies import PolicyReport, check_accuracy
from rewards.proof import OUTCOMES, Proof, Row
from rewards.rule_audit import RuleAudit
from rewards.safe_files import MEBIBYTE, Unreadable, read_text
from rewards.types import LEVELS

WIDTH = 100
SHOWN_IDS = 3
"""Case ids named in a line before "and N more"."""


def render(config: Config, material: Material, examination: Examination) -> str:
    """The whole examination as text of at most `WIDTH` columns, counterexamples and refusals aside."""
    blocks = [
        reward_lines(material.reward, examination),
        table_lines(examination.proof),
        proof_lines(examination.proof),
        probe_lines(examination.policies, material),
        rule_lines(examination, material),
        data_lines(examination.data, material),
        plan_lines(config, examination.plan),
        verdict_lines(config, examination),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def reward_lines(reward: Reward, examination: Examination) -> list[str]:
    """Which reward, and whether its own example cases hold."""
    failing = examination.failing_examples
    examples = f"{len(failing)} of its example cases fail" if failing else "its example cases hold"
    return [
        f"reward    {reward.name}: {visible(reward.about)}",
        f"          sha256 {reward.sha256[:16]}, {len(reward.rules)} rules, {examples}",
        *(f"          FAILS {visible(line)}" for line in failing),
    ]


def table_lines(proof: Proof) -> list[str]:
    """The whole table: a row for each gold level and combination of triggers; equal rows are printed once."""
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
        "          cut: by the token budget, before an answer; timeout: of a pattern, whatever the answer",
    ]
    if proof.overlong:
        lines.append(
            f"          with the overlong penalty: 0 to {signed(-proof.overlong.penalty)} in the budget's last "
            f"{proof.overlong.cache:,} tokens"
        )
    lines += [f"          {tag} = {name}" for name, tag in tags.items()]
    lines.append(f"  gold  {'triggers':<{firing}}" + "".join(f"{head:>{max(width, len(head) + 2)}}" for head in heads))
    for (gold, values), combos in alike.items():
        padded = (f"{value:>{max(width, len(head) + 2)}}" for value, head in zip(values, heads, strict=True))
        lines.append(f"  {gold:>4}  {_combos(combos):<{firing}}" + "".join(padded))
    return lines


def _cell(row: Row) -> str:
    return signed(row.low) if row.low == row.high else f"{signed(row.low)}..{signed(row.high)}"


def _combos(combos: list[str]) -> str:
    return ", ".join(combos) if len(combos) <= 3 else f"{combos[0]} … {combos[-1]} ({len(combos)})"


def proof_lines(proof: Proof) -> list[str]:
    """Each invariant with its margin and the pair of rows that comes closest to breaking it."""
    verdict = f"sound, smallest margin {proof.smallest_margin:+.3g}" if proof.sound else "NOT SOUND"
    lines = [f"proof     {verdict}"]
    for invariant in proof.invariants:
        mark = "holds" if invariant.holds else "FAILS"
        lines.append(f"  {mark}  margin {invariant.margin:>+6.3g}  {invariant.claim}")
        if invariant.better and invariant.worse:
            closest = "closest pair" if invariant.holds else "counterexample"
            lines += [f"         {closest}: {invariant.better}", f"         {'and':>{len(closest)}}: {invariant.worse}"]
    return lines


def probe_lines(report: PolicyReport | None, material: Material) -> list[str]:
    """What every policy earns on the training stream, the best first."""
    if report is None:
        if material.cases is not None:
            return ["probes    none: patterns run out of time on too many cases"]
        asked = [f"          {visible(fault)}" for fault in material.faults]
        return ["probes    none: no cases", *asked] if asked else ["probes    none: --reward-only reads no cases"]
    lines = [
        f"probes    expected reward ± std on {len(material.cases or ()):,} training cases, oversampled as configured"
    ]
    for rank, one in enumerate(report.ranked, 1):
        beats = "  BEATS THE HONEST POLICY" if one.policy in report.beaten_by else ""
        here = "  <- honest, errors one level off" if one is report.honest else ""
        lines.append(f"  {rank:>4}  {one.policy:<28}{one.mean:>+8.3f} ± {one.std:.3f}{beats}{here}")
    return lines


def rule_lines(examination: Examination, material: Material) -> list[str]:
    """How each rule meets the cases; without cases, only the rules that can never matter."""
    dead = [f"          {name}: can never change an advantage, whatever the data" for name in examination.dead_rules]
    if examination.rules is None or material.cases is None:
        return ["rules     that no case could make matter:", *dead] if dead else []
    if not examination.rules:
        return ["rules     none"]
    lines = [f"rules     {'cases in which the rule may speak, by gold level':<56}1      2      3      4      5"]
    for audit in examination.rules:
        lines.append(f"  {audit.rule:<58}" + "".join(f"{count:>7,}" for count in audit.fires))
        lines += [f"          {note}" for note in _rule_notes(audit, material.reward.rule(audit.rule))]
    return lines + dead


def _rule_notes(audit: RuleAudit, rule: Rule) -> list[str]:
    notes = []
    if audit.wordings:
        notes.append("found: " + visible(", ".join(f"{word} ({count})" for word, count in audit.wordings[:4])))
    if rule.trigger and (elsewhere := sum(audit.matches) - sum(audit.fires)):
        notes.append(f"the trigger also matches {elsewhere:,} cases of gold levels it does not speak about")
    if audit.negated:
        notes.append(f"behind a negation or the past: {_ids(audit.negated)}")
    if audit.never_fires:
        notes.append("never fires on these cases")
    elif not audit.changes_advantage:
        notes.append("fires, but can never change an advantage here")
    return notes


def data_lines(data: DataAudit | None, material: Material) -> list[str]:
    """Level mix, repeated texts, and what training shares with the evaluation sets."""
    if data is None:
        return []
    lines = [f"data      {'gold level':<26}1        2        3        4        5"]
    for name, counts in (("cases", data.levels), ("after oversampling", data.stream)):
        shares = "".join(f"{count:>9,}" for count in counts)
        total = sum(counts)
        lines.append(f"          {name:<18}{shares}")
        lines.append(f"          {'':<18}" + "".join(f"{count / total:>9.1%}" for count in counts))
    lines.append(f"          texts that stand more than once: {len(data.duplicates)}")
    if data.contradictions:
        lines.append(
            f"          of them with different gold levels: {_ids(['='.join(g) for g in data.contradictions])}"
        )
    for overlap in data.overlaps:
        if overlap.same_id:
            lines.append(f"          ids also in {overlap.name}: {_ids(overlap.same_id)}")
        if overlap.same_text:
            lines.append(f"          texts also in {overlap.name}: {_ids(['='.join(p) for p in overlap.same_text])}")
    if not data.overlaps and material.sets:
        lines.append(f"          no id or text repeats in {', '.join(material.sets)}")
    return [*lines, *(f"          NOT EXAMINED {visible(fault)}" for fault in material.faults)]


def plan_lines(config: Config, plan: Plan) -> list[str]:
    """The batch arithmetic, and the memory by estimate."""
    lines = [
        f"plan      {plan.steps:,} steps × {plan.prompts} prompts × {plan.group_size} completions = "
        f"{plan.completions:,} completions",
        f"          ≤ {plan.tokens_a_step:,} sampled tokens a step (budget {config.rollout.max_new_tokens:,}); "
        f"{plan.micro_batches} micro-batches × {plan.inner_epochs} inner epoch(s)",
    ]
    if plan.frozen is None or plan.trained is None:
        return [*lines, f"          {config.model.name}: shape not known here, so no parameters and no memory"]
    lines.append(
        f"          {config.model.name}: {plan.frozen:,} parameters frozen, {plan.trained:,} trained "
        f"in {plan.modules} layers"
    )
    for line in plan.memory:
        lines.append(f"  estimate  {line.part:<15}{line.phase:<8}{line.bytes / 1e9:>9.3f} GB   {line.formula}")
    peaks = " GB, ".join(f"{phase} {plan.peak(phase) / 1e9:.2f}" for phase in ("rollout", "update"))
    return [*lines, f"  estimate  together: {peaks} GB"]


def verdict_lines(config: Config, examination: Examination) -> list[str]:
    """Sound, unsound or incomplete; why, and what could not be examined."""
    alone = ", the reward alone: no cases were asked for" if examination.data is None and not examination.faults else ""
    lines = [f"verdict   {examination.verdict}{alone}"]
    lines += [f"          - {visible(reason)}" for reason in examination.refusals]
    if config.reward.allow_unsound:
        lines.append(f"          training is allowed all the same: {visible(config.reward.reason)}")
    lines += [f"          left out: {visible(line)}" for line in examination.left_out]
    if examination.unchecked:
        lines += [f"          not checked: {visible(what)}" for what in examination.unchecked]
        lines.append("          (--reward-only looks at the reward and the plan alone)")
    return lines


def record(config: Config, examination: Examination) -> dict[str, object]:
    """The examination as JSON holds it: no case texts; a margin that nothing bounds is null."""
    proof = examination.proof
    return {
        "reward": {"name": proof.reward, "sha256": proof.sha256, "failing_examples": examination.failing_examples},
        "verdict": examination.verdict,
        "sound": examination.verdict == "SOUND",
        "refusals": examination.refusals,
        "allowed": config.reward.reason if config.reward.allow_unsound else None,
        "faults": examination.faults,
        "left_out": examination.left_out,
        "unchecked": examination.unchecked,
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
        "probes": examination.policies
        and {**asdict(examination.policies), "beaten_by": examination.policies.beaten_by},
        "rules": examination.rules and [asdict(audit) for audit in examination.rules],
        "dead_rules": examination.dead_rules,
        "timeouts": examination.timeouts and asdict(examination.timeouts),
        "data": examination.data and asdict(examination.data),
        "plan": {
            **asdict(examination.plan),
            "completions": examination.plan.completions,
            "peak_bytes": {phase: examination.plan.peak(phase) for phase in ("rollout", "update")},
        },
    }


def explain(
    material: Material, case_id: str, completion: str, *, thinking: bool, finished: bool, length: Overlong | None
) -> str:
    """How one completion of one case is scored: what was parsed, what each rule said, each part and the total.

    Control characters of the case and the completion are shown as escapes. A text's tokens are not counted here: the
    overlong penalty is 0 for a finished completion, with a line that says so, and whole for one that was cut.

    Raises:
        UserError: no training or evaluation case has this id.
    """
    case = _named_case(material, case_id)
    reward = material.reward
    score = reward.score(
        text=case.text,
        gold=case.esi,
        completion=completion,
        thinking=thinking,
        finished=finished,
        case_id=case.id,
        length_penalty=-length.penalty if length and not finished else 0.0,
    )
    lines = [
        f"case      {visible(case.id)}, gold ESI {case.esi}",
        *(f"          {line}" for line in textwrap.wrap(visible(case.text), WIDTH - 10)),
        f"prompt    thinking {'on: it opened <think>' if thinking else 'off'}",
        f"answer    {_answer(score, completion)}" + ("" if finished else "; cut by the token budget"),
    ]
    if score.timed_out:
        lines.append("rules     a pattern ran out of time: every completion of this case gets the floor")
    else:
        said = [_rule_said(reward, rule, case.text, case.esi, score) for rule in reward.rules]
        lines += [f"{'rules' if i == 0 else '':<10}{line}" for i, line in enumerate(said)]
    lines += [f"{'parts' if i == 0 else '':<10}{n:<28}{signed(v):>7}" for i, (n, v) in enumerate(score.parts.items())]
    if length and finished:
        lines.append(
            f"          overlong: up to {signed(-length.penalty)} in the budget's last {length.cache:,} tokens; the "
            "text's are not counted here"
        )
    return "\n".join([*lines, f"total     {'':<28}{signed(score.total):>7}"])


def _named_case(material: Material, case_id: str) -> Case:
    every = [*(material.cases or ()), *(case for members in material.sets.values() for case in members)]
    for case in every:
        if case.id == case_id:
            return case
    unread = "".join(f"\nnot read: {fault}" for fault in material.faults)
    raise UserError(f"no training or evaluation case has the id {case_id!r}; {len(every):,} were read{unread}")


def _answer(score: Score, completion: str) -> str:
    level = "none" if score.answer.level is None else f"ESI {score.answer.level}"
    if score.answer.span is None:
        return f"{level}, {score.answer.reason}"
    begin, end = score.answer.span
    return f'{level}, {score.answer.reason}, from characters {begin}-{end}: "{visible(completion[begin:end])}"'


def _rule_said(reward: Reward, rule: Rule, text: str, gold: int, score: Score) -> str:
    """One rule's say: fired with its span and value, or the first condition that kept it silent."""
    if fired := next((one for one in score.fired if one.rule == rule.name), None):
        begin, end = fired.span or (0, 0)
        where = f' on characters {begin}-{end}: "{visible(text[begin:end])}"' if fired.span else ""
        left = score.parts[rule.name]
        stacked = "" if left == fired.value else f", of which stacking leaves {signed(left)}"
        return f"{rule.name} fired{where}: {signed(fired.value)}{stacked}"
    if gold not in rule.gold:
        why = f"it speaks about gold {_levels(rule.gold)}"
    elif not reward.applies(rule.name, text, gold):
        why = "its trigger does not fire on this text"
    elif score.answer.level is None:
        why = "there is no answer to judge"
    else:
        why = f"it speaks about answers {_levels(rule.predicted)}"
    return f"{rule.name} silent: {why}"


def _levels(levels: frozenset[int]) -> str:
    return "any" if len(levels) == len(LEVELS) else ", ".join(map(str, sorted(levels)))


def _ids(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN_IDS:,} more" if len(ids) > SHOWN_IDS else ""
    return f"{len(ids):,} ({visible(', '.join(ids[:SHOWN_IDS]))}{more})"


def signed(value: float) -> str:
    """At most four digits with their sign; a plain 0 for nothing.

    >>> signed(-0.5), signed(1.0), signed(0.0)
    ('-0.5', '+1', '0')
    """
    return f"{value:+.4g}" if value else "0"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m grpo preflight", description="Prove a run's reward and probe it on its cases, without a model."
    )
    made.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    made.add_argument("--honest", type=float, default=HONEST, metavar="SHARE", help="accuracy that no hack may beat")
    made.add_argument("--reward-only", action="store_true", help="read no cases: proof and plan alone")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    one = made.add_argument_group("one completion")
    one.add_argument("--explain", metavar="CASE_ID", help="show how a completion of this case is scored")
    one.add_argument(
        "--completion",
        metavar="TEXT|@FILE",
        help="the completion, or the file that holds it; a text that begins with @ is written @@",
    )
    one.add_argument("--thinking", choices=("on", "off"), help="did the prompt open <think>? (default: the config's)")
    one.add_argument("--truncated", action="store_true", help="the token budget cut the completion")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    arguments = parser().parse_args(argv)
    try:
        _check_usage(arguments)
        config, _ = load_config(arguments.config, arguments.set)
        material = gather(config, reward_only=arguments.reward_only)
        if arguments.explain is not None:
            print(_explained(config, material, arguments))
            return 0
        examination = examine(config, material, accuracy=arguments.honest)
    except (UserError, RewardError) as error:
        message = error_lines(error)
        print(message, file=sys.stderr)
        if arguments.json:
            print(json.dumps({"error": message.removeprefix("error: ")}))
        return 2
    if arguments.json:
        print(json.dumps(record(config, examination), allow_nan=False))
    else:
        print(render(config, material, examination))
    for fault in examination.faults:
        print(f"error: {visible(fault)}", file=sys.stderr)
    return 2 if examination.faults else 0 if examination.sound else 1


def _check_usage(arguments: argparse.Namespace) -> None:
    check_accuracy(arguments.honest)
    if (arguments.explain is None) != (arguments.completion is None):
        raise UserError("--explain and --completion belong together")
    if arguments.explain is not None and (arguments.reward_only or arguments.json):
        raise UserError("--explain needs the cases and prints text: leave out --reward-only and --json")


def _explained(config: Config, material: Material, arguments: argparse.Namespace) -> str:
    thinking = arguments.thinking or ("off" if config.rollout.thinking == "off" else "on")
    return explain(
        material,
        arguments.explain,
        _completion(arguments.completion),
        thinking=thinking == "on",
        finished=not arguments.truncated,
        length=length_term(config),
    )


def _completion(argument: str) -> str:
    if argument.startswith("@@") or not argument.startswith("@"):
        return argument.removeprefix("@")
    try:
        return read_text(Path(argument[1:]), most=64 * MEBIBYTE)
    except Unreadable as error:
        raise UserError(f"--completion {argument}: {error}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that closes early is no error
    sys.exit(main())
