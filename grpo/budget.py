"""Token-budget accounting: what the budget did to the completions of a step."""

from collections.abc import Sequence

from grpo.stats import Stats, mean_of
from grpo.types import Completion


def budget_stats(completions: Sequence[Completion]) -> Stats:
    """Truncation statistics, as (sum, count).

    ``completions/clipped_ratio`` is TRL's: the share of completions whose last token is not an end token. One that ends
    with an end token exactly at the budget is finished.

    >>> done, cut = Completion((5, 2), (0.0, 0.0), True, "a"), Completion((5, 6), (0.0, 0.0), False, "ab")
    >>> budget_stats([done, cut])["completions/clipped_ratio"]
    (1.0, 2.0)
    """
    lengths = [len(c.ids) for c in completions]
    return {
        "completions/clipped_ratio": mean_of(not c.finished for c in completions),
        "completions/mean_length": mean_of(lengths),
        "completions/mean_terminated_length": mean_of(len(c.ids) for c in completions if c.finished),
        "completions/max_length": (float(max(lengths)), 1.0),
        "completions/truncated_token_share": (
            float(sum(len(c.ids) for c in completions if not c.finished)),
            float(sum(lengths)),
        ),
    }
