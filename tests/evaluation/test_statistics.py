"""Intervals, kappas, the paired test and pass@k against oracles that count, enumerate or solve."""

import itertools
import math
import random
from collections.abc import Sequence
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.evaluation.statistics import (
    clustered_wilson,
    cohen_kappa,
    majority,
    mcnemar,
    pass_at_k,
    quadratic_kappa,
    wilson,
)

levels = st.integers(1, 5)
counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def score_bound(successes: int, trials: int, *, upper: bool) -> float:
    """By bisection: the farthest share that the score test with |p̂ − p| = z·√(p(1−p)/n) does not refuse."""
    z = NormalDist().inv_cdf(0.975)
    observed = successes / trials
    inside, outside = observed, 1.0 if upper else 0.0
    for _ in range(200):
        middle = (inside + outside) / 2
        if abs(observed - middle) <= z * math.sqrt(middle * (1 - middle) / trials):
            inside = middle
        else:
            outside = middle
    return inside


@given(counts)
def test_wilson_is_where_the_score_test_turns(count: tuple[int, int]) -> None:
    successes, trials = count
    low, high = wilson(successes, trials)
    assert low == pytest.approx(score_bound(successes, trials, upper=False), abs=1e-9)
    assert high == pytest.approx(score_bound(successes, trials, upper=True), abs=1e-9)


@given(counts)
def test_wilson_holds_the_share_mirrors_and_narrows(count: tuple[int, int]) -> None:
    successes, trials = count
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))
    more = wilson(4 * successes, 4 * trials)
    assert more[1] - more[0] < high - low


def test_wilson_of_the_card() -> None:
    assert wilson(28, 36) == pytest.approx((0.6192, 0.8829), abs=1e-4)  # "28/36 has 62–88 %"
    assert wilson(0, 36)[0] == 0.0 and wilson(36, 36)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [(-1, 3), (4, 3), (math.nan, 3), (0, math.inf)])
def test_wilson_refuses_what_is_no_count(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(*bad)


# ---- several answers a case -------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 6))
def test_answers_that_agree_within_each_case_are_one_trial_a_case(right: list[bool], samples: int) -> None:
    share, interval = clustered_wilson([samples * r for r in right], [samples] * len(right))
    assert share == sum(right) / len(right)
    assert interval == pytest.approx(wilson(sum(right), len(right)))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40))
def test_the_interval_lies_between_that_of_the_cases_and_that_of_the_answers(right: list[int]) -> None:
    share, (low, high) = clustered_wilson(right, [4] * len(right))
    n = len(right)
    cases, answers = wilson(min(share * n, n), n), wilson(sum(right), 4 * n)
    assert cases[0] - 1e-12 <= low <= answers[0] + 1e-12 and answers[1] - 1e-12 <= high <= cases[1] + 1e-12


def test_the_effective_number_of_trials_by_hand() -> None:
    # shares ½, ½, 1, 0 of 4 answers each: their sample variance is 1/6, so v = 1/24 and n* = ¼ ÷ 1/24 = 6 of 16
    _, interval = clustered_wilson([2, 2, 4, 0], [4, 4, 4, 4])
    assert interval == pytest.approx(wilson(3, 6))
    # unequal clusters: p = 4/7, residuals 1 − 4/7, 1 − 8/7, 2 − 16/7; v = 3/2 · Σ² / 49
    residuals = (1 - 4 / 7, 1 - 8 / 7, 2 - 16 / 7)
    effective = (4 / 7) * (3 / 7) / (1.5 * sum(r * r for r in residuals) / 49)
    assert effective > 7
    assert clustered_wilson([1, 1, 2, 0], [1, 2, 4, 0]) == (4 / 7, pytest.approx(wilson(4, 7)))


def coverage(interval: object, trials: int = 400) -> float:
    """How often an interval of 30 cases × 8 answers, where half of the cases are nearly always right and half seldom,
    holds the true share ½."""
    rng = random.Random(5)
    held = 0
    for _ in range(trials):
        chance = [0.92 if rng.random() < 0.5 else 0.08 for _ in range(30)]
        right = [sum(rng.random() < p for _ in range(8)) for p in chance]
        low, high = interval(right)  # type: ignore[operator]
        held += low <= 0.5 <= high
    return held / trials


def test_it_covers_where_counting_answers_as_independent_does_not() -> None:
    assert coverage(lambda right: clustered_wilson(right, [8] * 30)[1]) == pytest.approx(0.95, abs=0.03)
    assert coverage(lambda right: wilson(sum(right), 240)) < 0.7


def test_clusters_must_be_clusters() -> None:
    for successes, trials in (([], []), ([0], [0]), ([3], [2]), ([-1], [2])):
        with pytest.raises(ValueError, match="clusters"):
            clustered_wilson(successes, trials)
    with pytest.raises(ValueError):
        clustered_wilson([1, 1], [2])


# ---- kappas -----------------------------------------------------------------------------------------------------


def kappa_by_matrices(pairs: Sequence[tuple[int, int]], weight: object, size: int) -> float | None:
    """The textbook: two normalised matrices and their weighted sums."""
    observed = [[0.0] * size for _ in range(size)]
    for a, b in pairs:
        observed[a - 1][b - 1] += 1 / len(pairs)
    rows = [sum(observed[i]) for i in range(size)]
    columns = [sum(observed[i][j] for i in range(size)) for j in range(size)]
    top = bottom = 0.0
    for i in range(size):
        for j in range(size):
            top += weight(i, j) * observed[i][j]  # type: ignore[operator]
            bottom += weight(i, j) * rows[i] * columns[j]  # type: ignore[operator]
    return 1 - top / bottom if bottom > 1e-12 else None


@given(st.lists(st.tuples(levels, levels), min_size=1, max_size=60))
def test_kappas_are_the_textbooks(pairs: list[tuple[int, int]]) -> None:
    quadratic, cohen = quadratic_kappa(pairs), cohen_kappa(pairs)
    oracle = kappa_by_matrices(pairs, lambda i, j: (i - j) ** 2 / 16, 5)
    assert quadratic == (None if oracle is None else pytest.approx(oracle, abs=1e-9))
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    chance = sum(sum(a == k for a, _ in pairs) * sum(b == k for _, b in pairs) for k in range(1, 6)) / len(pairs) ** 2
    assert cohen == (None if chance == 1 else pytest.approx((agreement - chance) / (1 - chance), abs=1e-9))


@given(st.lists(st.tuples(levels, levels), min_size=2, max_size=40))
def test_kappas_do_not_ask_who_is_first_and_quadratic_not_which_end_is_1(pairs: list[tuple[int, int]]) -> None:
    assert quadratic_kappa([(b, a) for a, b in pairs]) == pytest.approx(quadratic_kappa(pairs))
    assert cohen_kappa([(b, a) for a, b in pairs]) == pytest.approx(cohen_kappa(pairs))
    assert quadratic_kappa([(6 - a, 6 - b) for a, b in pairs]) == pytest.approx(quadratic_kappa(pairs))


def test_kappa_of_constants() -> None:
    assert quadratic_kappa([(g, 2) for g in (1, 2, 3, 5)]) == pytest.approx(0.0)  # an always-2 agrees by chance alone
    assert quadratic_kappa([(2, 2)] * 3) is None and cohen_kappa([(2, 2)] * 3) is None and quadratic_kappa([]) is None
    assert cohen_kappa([(None, None), (2, 2)]) == 1.0  # no parse is a category


# ---- the paired test --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", range(1, 12))
def test_mcnemar_counts_the_signs_at_least_as_far_from_even(changed: int) -> None:
    for fixed in range(changed + 1):
        broken = changed - fixed
        signs = itertools.product((0, 1), repeat=changed)
        as_far = sum(abs(2 * sum(sign) - changed) >= abs(fixed - broken) for sign in signs)
        assert mcnemar(fixed, broken) == as_far / 2**changed


@given(st.integers(0, 500), st.integers(0, 500))
def test_mcnemar_is_a_p_value_that_does_not_ask_for_the_side(fixed: int, broken: int) -> None:
    assert 0 < mcnemar(fixed, broken) == mcnemar(broken, fixed) <= 1
    assert mcnemar(fixed, fixed) == 1.0


def test_mcnemar_far_out() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(190, 0) == 2.0**-189


# ---- several samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))


@given(st.lists(st.none() | levels, max_size=9))
def test_no_level_has_more_votes_than_the_majority_and_a_tie_goes_to_the_acute(said: list[int | None]) -> None:
    winner = majority(said)
    spoken = [level for level in said if level is not None]
    assert (winner is None) == (not spoken)
    assert winner == majority(said[::-1])
    for level in set(spoken):
        assert winner is not None
        assert spoken.count(winner) > spoken.count(level) or winner <= level
        assert spoken.count(winner) >= spoken.count(level)
