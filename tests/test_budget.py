"""Truncation statistics on hand-made completions."""

from grpo.budget import budget_stats
from grpo.stats import means
from grpo.types import Completion


def made(length: int, finished: bool) -> Completion:
    return Completion(tuple(range(length)), (-0.5,) * length, finished, "…")


def test_definitions() -> None:
    completions = [made(4, True), made(10, True), made(10, False), made(10, False)]
    assert means(budget_stats(completions)) == {
        "completions/clipped_ratio": 0.5,
        "completions/mean_length": 8.5,
        "completions/mean_terminated_length": 7.0,
        "completions/max_length": 10.0,
        "completions/truncated_token_share": 20 / 34,
    }


def test_ending_exactly_at_the_budget_is_finished() -> None:
    assert means(budget_stats([made(10, True), made(10, True)]))["completions/clipped_ratio"] == 0


def test_nothing_finished_has_no_mean_terminated_length() -> None:
    stats = means(budget_stats([made(10, False)]))
    assert stats["completions/mean_terminated_length"] is None and stats["completions/clipped_ratio"] == 1
