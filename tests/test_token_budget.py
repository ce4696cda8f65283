"""Token-budget accounting: every definition on completions counted by hand, then against loops, then its invariances.

An id of `END` is an end token and nothing else is: the oracles read the last id, never `Completion.finished`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.runtime.errors import UserError
from grpo.stats import Stats, to_means
from grpo.token_budget import (
    NO_PARSE_REASONS,
    clipped_ratio_forecast,
    finish_reason,
    length_stats,
    parse_stats,
    reward_by_truncation,
    truncation_advantage_shift,
)
from grpo.types import Case, Completion, Group, Prompt
from rewards import load_reward
from rewards.types import Score

END = 2
BUDGET = 10


def add_stats(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Stats:
    """Sums and counts added up by name."""
    total: Stats = {}
    for part in parts:
        for name, (value, count) in part.items():
            sum_, number = total.get(name, (0.0, 0.0))
            total[name] = (sum_ + value, number + count)
    return total


def made(length: int, finished: bool, text: str = "…") -> Completion:
    ids = tuple(range(10, 10 + length))
    return Completion((*ids[:-1], END) if finished else ids, (-0.5,) * length, finished, text)


STEP = tuple(
    made(length, finished)
    for length, finished in [
        (4, True),
        (10, True),  # ends exactly at the budget
        (10, False),
        (3, False),  # stopped early by something else
        (5, True),
        (10, False),
        (6, True),
        (8, True),
    ]
)
"""Under a budget of 10. Sorted lengths: 3 4 5 6 8 10 10 10."""


def test_stop_causes() -> None:
    causes = [finish_reason(completion, BUDGET) for completion in STEP]
    assert causes == ["end", "end", "budget", "other", "end", "budget", "end", "end"]


def test_budget_statistics_by_hand() -> None:
    assert length_stats(STEP, max_new_tokens=BUDGET) == {
        "completions/clipped_ratio": (3, 8),
        "completions/stop_end": (5, 8),
        "completions/stop_budget": (2, 8),
        "completions/stop_other": (1, 8),
        "completions/mean_length": (56, 8),
        "completions/min_length": (3, 1),
        "completions/max_length": (10, 1),
        "completions/mean_terminated_length": (33, 5),
        "completions/min_terminated_length": (4, 1),
        "completions/max_terminated_length": (10, 1),
        "completions/length_p10": (3, 1),  # rank ⌈0.8⌉ = 1
        "completions/length_p50": (6, 1),  # rank 4; between 6 and 8 is 7, which no completion has
        "completions/length_p90": (10, 1),  # rank ⌈7.2⌉ = 8
        "completions/length_p99": (10, 1),
        "completions/tokens": (56, 1),
        "completions/truncated_tokens": (23, 1),
        "completions/truncated_token_share": (23, 56),
    }


def test_quantiles_are_the_nearest_rank() -> None:
    ladder = length_stats([made(length, True) for length in range(1, 101)], max_new_tokens=100)
    assert [ladder[f"completions/length_p{p}"] for p in (10, 50, 90, 99)] == [(10, 1), (50, 1), (90, 1), (99, 1)]
    ladder = length_stats([made(length, True) for length in range(1, 12)], max_new_tokens=100)
    assert [ladder[f"completions/length_p{p}"] for p in (10, 50, 90, 99)] == [(2, 1), (6, 1), (10, 1), (11, 1)]


def test_ending_exactly_at_the_budget_is_finished() -> None:
    stats = to_means(length_stats([made(BUDGET, True)] * 2, max_new_tokens=BUDGET))
    assert stats["completions/clipped_ratio"] == 0 and stats["completions/stop_end"] == 1
    assert stats["completions/truncated_tokens"] == 0 and stats["completions/truncated_token_share"] == 0


def test_lengths_of_the_finished_leave_the_truncated_out() -> None:
    stats = to_means(
        length_stats([made(3, False), made(4, True), made(6, True), made(9, False)], max_new_tokens=BUDGET)
    )
    ends = [stats[f"completions/{one}_length"] for one in ("min", "min_terminated", "max_terminated", "max")]
    assert ends == [3, 4, 6, 9]


def test_nothing_finished_has_no_terminated_length() -> None:
    stats = length_stats([made(BUDGET, False)], max_new_tokens=BUDGET)
    assert all(stats[f"completions/{one}_terminated_length"] == (0, 0) for one in ("mean", "min", "max"))
    assert stats["completions/clipped_ratio"] == (1, 1)


THINKING = Prompt(Case("c-think", "Chest pain.", 2), (1, 2), thinking=True)
PLAIN = Prompt(Case("c-plain", "Chest pain.", 2), (1, 2), thinking=False)
REWARD = load_reward("v49")

ANSWERS = (
    (
        THINKING,
        (
            ("So. </think> ANSWER: ESI 2", True),  # parsed
            ("So. ANSWER: ESI 2", True),  # finished inside the thought
            ("So. Then", False),  # cut inside the thought
            ("So. </think> ANSWER: ESI 2\nIn", False),  # cut, yet parsed
            ("So. </think> ANSWER: ESI 2-3", False),  # cut at a range
        ),
    ),
    (
        PLAIN,
        (
            ("ANSWER: ESI 2", True),  # parsed, never thought
            ("<think>So.</think><think>Or.</think> ANSWER: ESI 7", True),  # thought twice by itself
            ("ANSWER: ESI 2\n<think>or", False),  # cut in a thought after the answer, yet parsed
            ("<think>a</think> b <think>c ANSWER: ESI 2", True),  # the last thought is open
            ("Chest pain", False),  # cut, no thought
            ("ANSWER: ESI 2\nANSWER: ESI 3", True),  # contradicts itself
        ),
    ),
)


def groups_of(table: Sequence[tuple[Prompt, Sequence[tuple[str, bool]]]]) -> list[Group]:
    return [Group(prompt, tuple(made(7, done, text) for text, done in row)) for prompt, row in table]


def scores_of(groups: Sequence[Group]) -> list[list[Score]]:
    return [
        [
            REWARD.score(
                text=group.prompt.case.text, gold=2, completion=one.text, thinking=group.prompt.thinking,
                finished=one.finished, case_id=group.prompt.case.id,
            )
            for one in group.completions
        ]
        for group in groups
    ]  # fmt: skip


def test_answer_statistics_by_hand() -> None:
    groups = groups_of(ANSWERS)
    assert parse_stats(groups, scores_of(groups)) == {
        "completions/opened_thinking": (8, 11),
        "completions/unclosed_thinking": (4, 11),
        "completions/truncated_parsed": (2, 5),  # of the finished, 2 of 6
        "completions/no_parse": (7, 11),
        "completions/no_parse/no_answer": (1, 11),
        "completions/no_parse/unclosed_thinking": (3, 11),
        "completions/no_parse/conflicting_answers": (1, 11),
        "completions/no_parse/range": (1, 11),
        "completions/no_parse/out_of_range": (1, 11),
    }


def test_what_follows_an_end_token_opens_and_closes_no_thought() -> None:
    groups = groups_of([(THINKING, [("So<|im_end|></think>", True)]), (PLAIN, [("ANSWER: 2<|im_end|><think>", True)])])
    stats = parse_stats(groups, scores_of(groups))
    assert stats["completions/opened_thinking"] == stats["completions/unclosed_thinking"] == (1, 2)


PIECES = ("<think>", "</think>", "ANSWER: ESI 2\n", "ANSWER: ESI 3\n", "ANSWER: ESI 9\n", "so ", "<|im_end|>")
WRITTEN = st.lists(st.tuples(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.booleans()), max_size=4)
ROWS = st.lists(st.tuples(st.sampled_from([THINKING, PLAIN]), WRITTEN), max_size=4)


@given(ROWS)
def test_answer_statistics_agree_with_a_walk_over_the_text(table: list[tuple[Prompt, list[tuple[str, bool]]]]) -> None:
    groups = groups_of(table)
    scores = scores_of(groups)
    opened = unclosed = 0
    for prompt, row in table:
        for text, _ in row:
            ever = now = prompt.thinking
            i = 0
            while i < len(text) and not text.startswith("<|im_end|>", i):
                if text.startswith("<think>", i):
                    ever = now = True
                elif text.startswith("</think>", i):
                    now = False
                i += 1
            opened, unclosed = opened + ever, unclosed + now
    count = sum(len(row) for _, row in table)
    stats = parse_stats(groups, scores)
    assert stats["completions/opened_thinking"] == (opened, count)
    assert stats["completions/unclosed_thinking"] == (unclosed, count)
    cut_answers = [one.answer for row, (_, texts) in zip(scores, table, strict=True)
                   for one, (_, done) in zip(row, texts, strict=True) if not done]  # fmt: skip
    assert stats["completions/truncated_parsed"] == (sum(a.reason == "parsed" for a in cut_answers), len(cut_answers))
    reasons = [stats[f"completions/no_parse/{reason.replace(' ', '_')}"] for reason in NO_PARSE_REASONS]
    assert (sum(total for total, _ in reasons), count) == stats["completions/no_parse"]
    assert stats["completions/no_parse/unclosed_thinking"] <= stats["completions/unclosed_thinking"]


def test_reward_by_status_by_hand() -> None:
    rewards = [1.0, 0.5, -2.0, -0.5, -0.5, 1.0, 1.5, -1.0]
    expected = {"reward/mean_finished": (1.5, 5), "reward/mean_truncated": (-1.5, 3)}
    assert reward_by_truncation(STEP, rewards) == expected
    assert reward_by_truncation(STEP, np.array(rewards)) == expected
    finished = [one for one in STEP if one.finished]
    assert reward_by_truncation(finished, [1.0] * 5)["reward/mean_truncated"] == (0, 0)


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_three_truncated_give_the_finished_one_an_advantage_of_one_and_a_half(kind: str) -> None:
    stats = truncation_advantage_shift([[-1, 1, -1, -1]], [[False, True, False, False]], kind=kind, epsilon=0.0, ddof=1)
    assert stats == {"advantage/truncation_pull": (1.5, 1), "advantage/truncation_pull_abs": (1.5, 1)}


def test_pull_by_hand_without_a_std() -> None:
    rewards = [[1.0, 0.0, -2.0, -1.0], [4.0, 0.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0], [1.0, 0.0, 5.0, 2.0]]
    finished = [[True, True, False, True], [True] * 4, [False] * 4, [True, True, False, False]]
    # Group 0: mean −1/2 with everybody, 0 without the truncated one: +1/2 for each of three.
    # Groups 1 and 2: nothing truncated; nothing finished. Group 3: mean 2 against 1/2: −3/2 for each of two.
    stats = truncation_advantage_shift(rewards, finished, kind="mean_only", epsilon=0.0, ddof=1)
    assert stats == {"advantage/truncation_pull": (-1.5, 5), "advantage/truncation_pull_abs": (4.5, 5)}


def test_pull_by_hand_with_a_std_and_epsilon() -> None:
    # Both means are 0. Everybody: squares 1 + 16 + 16 + 1, std √(34/4). The finished: squares 1 + 1, std 1.
    rewards, finished = [[1, -4, 4, -1]], [[True, False, False, True]]
    stats = truncation_advantage_shift(rewards, finished, kind="group", epsilon=0.5, ddof=0)
    shrunk = 1 / 1.5 - 1 / (math.sqrt(8.5) + 0.5)  # outliers in the std shrink +1 and −1 alike: no signed pull
    assert stats["advantage/truncation_pull"] == pytest.approx((0, 2))
    assert stats["advantage/truncation_pull_abs"] == pytest.approx((2 * shrunk, 2))
    assert set(truncation_advantage_shift(rewards, finished, kind="mean_only", epsilon=0.5, ddof=0).values()) == {
        (0, 2)
    }


def test_no_pull_where_nothing_is_truncated_or_nothing_finished() -> None:
    for finished in (np.ones((2, 3), bool), np.zeros((2, 3), bool), np.array([[True] * 3, [False] * 3])):
        stats = truncation_advantage_shift(np.arange(6).reshape(2, 3), finished, kind="group", epsilon=1e-4, ddof=1)
        assert set(stats.values()) == {(0.0, 0.0)}


EIGHTHS = st.integers(-16, 16).map(lambda n: n / 8)
GROUPS = st.lists(st.lists(st.tuples(EIGHTHS, st.booleans()), min_size=4, max_size=4), min_size=1, max_size=5)


@given(GROUPS, st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-4, 0.5]), st.booleans())
def test_pull_agrees_with_a_loop(groups: list[list[tuple[float, bool]]], ddof: int, epsilon: float, std: bool) -> None:
    def advantage(reward: float, baseline: list[float]) -> float:
        if len(baseline) < 2 or max(baseline) == min(baseline):
            return 0.0
        mean = sum(baseline) / len(baseline)
        variance = sum((r - mean) ** 2 for r in baseline) / (len(baseline) - ddof)
        return (reward - mean) / (math.sqrt(variance) + epsilon if std else 1.0)

    pulls = []
    for group in groups:
        everybody, without = [r for r, _ in group], [r for r, done in group if done]
        if len(without) < len(everybody):
            pulls += [advantage(r, everybody) - advantage(r, without) for r in without]
    rewards, finished = [[r for r, _ in group] for group in groups], [[done for _, done in group] for group in groups]
    stats = truncation_advantage_shift(
        rewards, finished, kind="group" if std else "mean_only", epsilon=epsilon, ddof=ddof
    )
    assert stats["advantage/truncation_pull"] == pytest.approx((sum(pulls), len(pulls)), abs=1e-9)
    assert stats["advantage/truncation_pull_abs"] == pytest.approx((sum(map(abs, pulls)), len(pulls)), abs=1e-9)


def test_forecast_by_hand() -> None:
    # Finished lengths: 4, 5, 6, 8, 10.
    assert clipped_ratio_forecast(STEP, max_new_tokens=BUDGET) == {
        "completions/clipped_ratio_at/25": (8, 8),  # 2.5 tokens, so 2
        "completions/clipped_ratio_at/50": (6, 8),  # 5 tokens: 4 and 5 are finished
        "completions/clipped_ratio_at/75": (5, 8),  # 7.5, so 7
    }


def test_a_smaller_budget_is_rounded_down_and_at_least_one() -> None:
    short = [made(length, True) for length in (1, 2, 3)]
    # 25, 50 and 75 % of 3 are 0.75, 1.5 and 2.25: budgets 1, 1 and 2.
    assert [total for total, _ in clipped_ratio_forecast(short, max_new_tokens=3).values()] == [2, 2, 1]


def stepped(budget: int) -> st.SearchStrategy[list[Completion]]:
    lengths = st.one_of(st.integers(1, budget), st.just(budget))
    return st.lists(st.builds(made, lengths, st.booleans()), max_size=12)


STEPS = st.integers(1, 40).flatmap(lambda budget: st.tuples(st.just(budget), stepped(budget)))


def cut(completions: Sequence[Completion], budget: int) -> list[Completion]:
    """The completions as a smaller budget would have drawn them: that the engine draws the same prefix is a test of
    `tests/test_rollout.py`."""
    prefixes = [one.ids[:budget] for one in completions]
    return [Completion(ids, (-0.5,) * len(ids), ids[-1] == END, "…") for ids in prefixes]


@given(STEPS)
def test_budget_statistics_agree_with_loops(step: tuple[int, list[Completion]]) -> None:
    budget, completions = step
    ends = [one.ids[-1] == END for one in completions]
    lengths = [len(one.ids) for one in completions]
    full = sum(not end and length == budget for end, length in zip(ends, lengths, strict=True))
    stats, count = length_stats(completions, max_new_tokens=budget), len(completions)
    assert stats["completions/clipped_ratio"] == (count - sum(ends), count)
    assert stats["completions/stop_end"] == (sum(ends), count)
    assert stats["completions/stop_budget"] == (full, count)
    assert stats["completions/stop_other"] == (count - sum(ends) - full, count)
    spent = sum(length for end, length in zip(ends, lengths, strict=True) if not end)
    assert stats["completions/truncated_token_share"] == (spent, sum(lengths))
    for p in (10, 50, 90, 99):  # the least length that at least p % of the completions do not exceed
        reached = [at for at in lengths if 100 * sum(length <= at for length in lengths) >= p * count]
        assert stats[f"completions/length_p{p}"] == ((min(reached), 1) if lengths else (0, 0))


@given(STEPS)
def test_forecast_is_what_cutting_by_hand_and_counting_again_gives(step: tuple[int, list[Completion]]) -> None:
    recorded, completions = step
    forecast = clipped_ratio_forecast(completions, max_new_tokens=recorded)
    for percent in (25, 50, 75):
        smaller = max(1, math.floor(percent * recorded / 100))
        recounted = length_stats(cut(completions, smaller), max_new_tokens=smaller)["completions/clipped_ratio"]
        assert forecast[f"completions/clipped_ratio_at/{percent}"] == recounted


ADDITIVE = (
    "clipped_ratio", "stop_end", "stop_budget", "stop_other", "mean_length", "mean_terminated_length",
    "truncated_token_share", "clipped_ratio_at/25", "clipped_ratio_at/50", "clipped_ratio_at/75",
)  # fmt: skip


def every_statistic(groups: Sequence[Group], rewards: Sequence[Sequence[float]], budget: int) -> Stats:
    completions = [one for group in groups for one in group.completions]
    return {
        **length_stats(completions, max_new_tokens=budget),
        **clipped_ratio_forecast(completions, max_new_tokens=budget),
        **parse_stats(groups, scores_of(groups)),
        **reward_by_truncation(completions, [reward for row in rewards for reward in row]),
    }


@given(st.lists(st.tuples(st.sampled_from([r for _, r in ANSWERS]), st.booleans(), EIGHTHS), max_size=6), st.data())
def test_parts_merge_to_the_whole(
    rows: list[tuple[tuple[tuple[str, bool], ...], bool, float]], data: st.DataObject
) -> None:
    groups = groups_of([(THINKING if thinking else PLAIN, row) for row, thinking, _ in rows])
    rewards = [[reward + i for i in range(len(row))] for row, _, reward in rows]
    at = sorted(data.draw(st.lists(st.integers(0, len(groups)), max_size=3)))
    bounds = list(zip([0, *at], [*at, len(groups)], strict=True))
    merged = add_stats(every_statistic(groups[i:j], rewards[i:j], BUDGET) for i, j in bounds)
    whole = every_statistic(groups, rewards, BUDGET)
    additive = {f"completions/{name}" for name in ADDITIVE} | {"reward/mean_finished", "reward/mean_truncated"}
    additive |= set(parse_stats([], []))
    for name in sorted(additive):
        assert merged[name] == whole[name], name
    for name in ("completions/tokens", "completions/truncated_tokens"):
        assert merged[name][0] == whole[name][0], "a total adds up; the parts it was added from are counted beside it"


@given(GROUPS, st.integers(0, 5))
def test_pull_merges_over_groups(groups: list[list[tuple[float, bool]]], at: int) -> None:
    def pull(part: list[list[tuple[float, bool]]]) -> Stats:
        rewards, finished = [[r for r, _ in group] for group in part], [[done for _, done in group] for group in part]
        return truncation_advantage_shift(rewards, finished, kind="group", epsilon=1e-4, ddof=1)

    merged = add_stats(pull(part) for part in (groups[:at], groups[at:]) if part)
    for name, value in pull(groups).items():
        assert merged[name] == pytest.approx(value, abs=1e-9)


def test_nothing_at_all_counts_nothing() -> None:
    stats = every_statistic([], [], BUDGET)
    assert set(stats.values()) == {(0, 0)}
    assert set(to_means(stats).values()) == {None}


def test_an_empty_part_changes_nothing() -> None:
    whole = length_stats(STEP, max_new_tokens=BUDGET)
    assert add_stats([whole, length_stats([], max_new_tokens=BUDGET)]) == whole


def test_the_names_are_apart_and_all_there() -> None:
    parts = [
        length_stats(STEP, max_new_tokens=BUDGET),
        clipped_ratio_forecast(STEP, max_new_tokens=BUDGET),
        parse_stats([], []),
        reward_by_truncation([], []),
        truncation_advantage_shift([[1, 2]], [[True, False]], kind="mean_only", epsilon=0.0, ddof=1),
    ]
    assert len(add_stats(parts)) == sum(len(part) for part in parts) == 17 + 3 + 9 + 2 + 2
    assert add_stats([length_stats([], max_new_tokens=1)]).keys() == parts[0].keys()


def test_what_does_not_belong_together_is_refused() -> None:
    groups = groups_of(ANSWERS)
    scores = scores_of(groups)
    with pytest.raises(UserError, match=r"at most max_new_tokens = 9 tokens, got one of 10"):
        length_stats(STEP, max_new_tokens=9)
    for short in (scores[:1], [scores[0], scores[1][:4]]):
        with pytest.raises(ValueError, match=r"zip\(\)"):
            parse_stats(groups, short)
    with pytest.raises(ValueError, match="in_baseline: expected bool"):
        truncation_advantage_shift([[1, 2]], [[1, 0]], kind="mean_only", epsilon=0.0, ddof=1)
