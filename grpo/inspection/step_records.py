"""A recorded step, its groups, completions and tokens as JSON values, which `grpo inspect` prints.

None stands for what was not recorded and for numbers that JSON does not have.
"""

from collections.abc import Callable
from typing import Any

from grpo.advantage import zero_variance
from grpo.config import Config
from grpo.metrics import token_slices
from grpo.run.folder import nan_to_none
from grpo.run.ledger import LedgerStep
from grpo.runtime.errors import UserError
from grpo.token_budget import finish_reason
from rewards import Score

JsonObject = dict[str, Any]


def step_record(entry: LedgerStep, config: Config) -> JsonObject:
    """Return a step and its groups, without texts."""
    step = entry.step
    uniform = zero_variance(entry.rewards, in_baseline=step.batch.baseline_mask.numpy().reshape(entry.rewards.shape))
    return {
        "run": config.name,
        "step": step.number,
        "steps": config.train.steps,
        "text": entry.text,
        "changed": list(entry.modified_files),
        "metrics": entry.metrics,
        "groups": [
            nan_to_none(
                {
                    "group": b,
                    "case": group.prompt.case.id or None,
                    "gold": group.prompt.case.gold_level,
                    "thinking": group.prompt.thinking,
                    "reward_mean": float(entry.rewards[b].mean()),
                    "reward_std": float(entry.rewards[b].std(ddof=1)),
                    "zero_variance": bool(uniform[b]),
                    "predicted": [score.answer.level for score in scores],
                    "stopped": [finish_reason(c, config.rollout.max_new_tokens) for c in group.completions],
                }
            )
            for b, (group, scores) in enumerate(zip(step.groups, step.scores, strict=True))
        ],
        "dropped": [
            {
                "case": group.case_id or None,
                "completions": len(group.lengths),
                "tokens": sum(group.lengths),
                "rewards": group.rewards,
            }
            for group in step.replaced_groups
        ],
    }


def group_record(entry: LedgerStep, config: Config, b: int) -> JsonObject:
    """Return group ``b`` with its texts and completions."""
    group = entry.step.groups[b]
    return step_record(entry, config)["groups"][b] | {
        "tags": list(group.prompt.case.tags),
        "case_text": group.prompt.case.text if entry.text == "full" else None,
        "prompt_tokens": len(group.prompt.ids),
        "completions": [member_record(entry, config, b, g) for g in range(len(group.completions))],
    }


def member_record(entry: LedgerStep, config: Config, b: int, g: int) -> JsonObject:
    """Return a completion with its reward and advantage by component, parsed answer and fired rules."""
    group, score = entry.step.groups[b], entry.step.scores[b][g]
    completion, rules_known = group.completions[g], entry.text != "off"
    case_text, text = (group.prompt.case.text, completion.text) if entry.text == "full" else (None, None)
    parts = {name: (float(part), float(entry.shares[name][b, g])) for name, part in score.parts.items()}
    record = {
        "member": g,
        "text": text,
        "tokens": len(completion.ids),
        "stopped": finish_reason(completion, config.rollout.max_new_tokens),
        "reward": float(entry.rewards[b, g]),
        "advantage": float(entry.advantages[b, g]),
        "components": {
            name: nan_to_none({"reward": reward, "advantage": advantage}) for name, (reward, advantage) in parts.items()
        },
        "predicted": score.answer.level,
        "reason": score.answer.reason if rules_known else None,
        "answer": _match(text, score.answer.span),
        "timed_out": score.timed_out if rules_known else None,
        "fired": _fired_rules(score, case_text) if rules_known else None,
    }
    return nan_to_none(record)


def _fired_rules(score: Score, case_text: str | None) -> list[JsonObject]:
    return [
        nan_to_none({"rule": fired.rule, "value": fired.value, "match": _match(case_text, fired.span)})
        for fired in score.fired
    ]


def _match(text: str | None, span: tuple[int, int] | None) -> JsonObject | None:
    return None if span is None else {"span": list(span), "text": None if text is None else text[span[0] : span[1]]}


def token_records(entry: LedgerStep, b: int, g: int, decode_token: Callable[[int], str] | None) -> list[JsonObject]:
    """Return one record for each token of a completion in each inner epoch.

    Args:
        decode_token: token id → text; None without a tokenizer.
    """
    batch, tokens, account = entry.step.batch, entry.step.logprobs, entry.account
    row = sum(len(group.completions) for group in entry.step.groups[:b]) + g
    place = token_slices([len(ids) for ids in batch.completion_ids])[row]
    recorded = entry.text == "full"
    records = (
        {
            "epoch": epoch + 1,
            "position": position,
            "id": token if recorded else None,
            "token": decode_token(token) if recorded and decode_token else None,
            "logprob": float(tokens.logprobs[epoch, t]),
            "old_logprob": float(tokens.logprobs[0, t]),
            "sampler_logprob": float(batch.sampler_logprobs[row, position]),
            "ref_logprob": None if tokens.ref_logprobs is None else float(tokens.ref_logprobs[t]),
            "entropy": float(tokens.entropy[t]),
            "ratio": float(account.ratio[epoch, t]),
            "kl": None if account.kl is None else float(account.kl[epoch, t]),
            "clip": {-1: "low", 0: None, 1: "high"}.get(int(account.clip_side[epoch, t]), "?"),
            "weight": float(batch.token_weights[row, 0]),
            "loss": float(account.loss[epoch, t]),
        }
        for epoch in range(len(tokens.logprobs))
        for position, (token, t) in enumerate(
            zip(batch.completion_ids[row], range(place.start, place.stop), strict=True)
        )
    )
    return [nan_to_none(record) for record in records]


def find_groups(entry: LedgerStep, name: str) -> list[int]:
    """Return the groups of a case id or, for ``#B``, group B. Raises `UserError` if there is none."""
    ids = [group.prompt.case.id for group in entry.step.groups]
    matches = [b for b, case in enumerate(ids) if case and case == name]
    matches = matches or [b for b in range(len(ids)) if name == f"#{b}"]
    if not matches:
        cases = ", ".join(case or f"#{b}" for b, case in list(enumerate(ids))[:8])
        more = ", …" if len(ids) > 8 else ""
        raise UserError(f"step {entry.step.number}: no case {name[:80]!r}; the cases of this step are {cases}{more}")
    return matches
