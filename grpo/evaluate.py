"""Cases → answers → rates, under the evaluation's own budget and temperature.

The noise of an evaluation depends on the seed, the set, the mode and the case, never on the training step: two
evaluations of one run differ by the policy alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.cases import row_key
from grpo.config import Config
from grpo.policy import Policy, render_prompt
from grpo.rollout import rollout
from grpo.types import Case, Completion
from rewards import Answer, Reward, parse_answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case answered once."""

    case: Case
    answer: Answer
    completion: Completion

    @property
    def predicted(self) -> int | None:
        return self.answer.level


def evaluate(
    policy: Policy,
    cases: Sequence[Case],
    config: Config,
    *,
    name: str,
    thinking: bool,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[Verdict, ...]:
    """One sampled answer to every case.

    Args:
        name: of the set; part of the noise key.
        thinking: the chat template's switch.
        progress: called with the number of cases just answered.
    """
    verdicts: list[Verdict] = []
    prompts = [
        render_prompt(policy.tokenizer, case, system_prompt=config.cases.system_prompt, thinking=thinking)
        for case in cases
    ]
    prompts.sort(key=lambda prompt: (len(prompt.ids), prompt.case.id))
    size = config.evaluate.batch_size
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        groups = rollout(
            policy,
            batch,
            [[row_key("evaluate", config.train.seed, name, str(thinking), p.case.id)] for p in batch],
            max_new_tokens=config.evaluate.max_new_tokens,
            temperature=config.evaluate.temperature,
        )
        for group in groups:
            completion = group.completions[0]
            answer = parse_answer(completion.text, thinking=group.prompt.thinking)
            verdicts.append(Verdict(group.prompt.case, answer, completion))
        progress(len(batch))
    order = {case.id: i for i, case in enumerate(cases)}
    return tuple(sorted(verdicts, key=lambda verdict: order[verdict.case.id]))


def summarise(verdicts: Sequence[Verdict], reward: Reward) -> dict[str, Any]:
    """The rates of an evaluation, each a share of all ``n`` cases; an answer that does not parse is wrong in every one.

    ``adjacent``: within one level. ``dangerous_under``: predicted at least two levels less acute than gold.
    ``high_acuity_under``: gold 1 or 2 and predicted less acute. ``confusion``: gold → [predicted 1 … 5, no parse].
    """
    n = len(verdicts)
    return {
        "n": n,
        "exact": _share(verdicts, lambda v: v.predicted == v.case.esi),
        "adjacent": _share(verdicts, lambda v: v.predicted is not None and abs(v.predicted - v.case.esi) <= 1),
        "dangerous_under": _share(verdicts, lambda v: v.predicted is not None and v.predicted >= v.case.esi + 2),
        "high_acuity_under": _share(
            verdicts, lambda v: v.predicted is not None and v.case.esi <= 2 and v.predicted > v.case.esi
        ),
        "no_parse": _share(verdicts, lambda v: v.predicted is None),
        "clipped_ratio": _share(verdicts, lambda v: not v.completion.finished),
        "mean_length": sum(len(v.completion.ids) for v in verdicts) / n,
        "by_rule": {
            rule.name: _subset(v for v in verdicts if reward.applies(rule.name, v.case.text, v.case.esi))
            for rule in reward.rules
        },
        "by_tag": {
            tag: _subset(v for v in verdicts if tag in v.case.tags)
            for tag in sorted({tag for v in verdicts for tag in v.case.tags})
        },
        "confusion": {
            str(gold): [
                sum(v.case.esi == gold and v.predicted == level for v in verdicts) for level in (1, 2, 3, 4, 5, None)
            ]
            for gold in range(1, 6)
        },
    }


def _share(verdicts: Sequence[Verdict], holds: Callable[[Verdict], bool]) -> float:
    return sum(map(holds, verdicts)) / len(verdicts)


def _subset(verdicts: Iterable[Verdict]) -> dict[str, float | int | None]:
    members = list(verdicts)
    right = sum(v.predicted == v.case.esi for v in members)
    return {"n": len(members), "exact": right / len(members) if members else None}
