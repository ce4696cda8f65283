"""Advantages. Tests that take only `maths` are also run on faulty copies, by test_planted_faults."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.support import oracles
from tests.support.maths_modules import REAL, Maths

KINDS = ("group", "mean_only", "batch", "leave_one_out")


@pytest.fixture
def maths() -> Maths:
    return REAL


def draws(seed: int, rounds: int = 12):
    """Rewards [B,G] and members [B,G], with equal rewards, equal groups and lonely members among them."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        shape = (int(rng.integers(1, 5)), int(rng.integers(2, 9)))
        rewards = rng.choice([-2.0, -0.5, 0.0, 0.1, 1.0, 1.5], shape) + rng.choice([0.0, 1.0]) * rng.normal(size=shape)
        rewards[0] = rewards[0, 0] if rng.random() < 0.4 else rewards[0]
        yield rewards, rng.random(shape) < 0.7


def test_matches_the_oracle(maths: Maths) -> None:
    for rewards, members in draws(1):
        everyone = np.ones(rewards.shape, bool)
        for kind in KINDS:
            for epsilon, ddof in ((1e-4, 1), (1e-4, 0), (0.5, 1), (0.5, 0)):
                settings = {"kind": kind, "epsilon": epsilon, "ddof": ddof}
                for given_mask, mask in ((None, everyone), (members, members)):
                    got = maths.advantage.advantages(rewards, **settings, in_baseline=given_mask)
                    expected = oracles.advantages(rewards.tolist(), kind, epsilon, ddof, mask.tolist())
                    assert got.dtype == np.float64
                    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12, err_msg=str(settings))


def test_one_success_in_eight(maths: Maths) -> None:
    rewards = [[1.0] + [0.0] * 7]
    for ddof, expected in ((1, 2.474), (0, 2.645)):
        got = maths.advantage.advantages(rewards, kind="group", epsilon=1e-4, ddof=ddof)
        assert got[0, 0] == pytest.approx(expected, abs=5e-4)


def test_equal_rewards_give_exactly_zero(maths: Maths) -> None:
    for value in (0.1, -2.0, 1 / 3, 1e-30, 1e6 + 0.1):
        for size in (2, 3, 7, 8, 11):
            rewards = np.full((2, size), value)
            rewards[1] = np.arange(size)
            for kind in KINDS:
                for epsilon in (0.0, 1e-12, 1e-4):
                    got = maths.advantage.advantages(rewards, kind=kind, epsilon=epsilon, ddof=1)
                    assert (got[0] == 0.0).all(), (kind, value, size)
                    assert np.isfinite(got).all() and (got[1] != 0.0).any()


def test_invariances(maths: Maths) -> None:
    rng = np.random.default_rng(2)
    for rewards, _ in draws(3):
        order = rng.permutation(rewards.shape[1])
        for kind in KINDS:
            settings = {"kind": kind, "epsilon": 1e-4, "ddof": 1}
            got = maths.advantage.advantages(rewards, **settings)
            np.testing.assert_allclose(got.sum(axis=1), 0.0, atol=1e-9)
            np.testing.assert_allclose(maths.advantage.advantages(rewards + 3.7, **settings), got, atol=1e-9)
            np.testing.assert_allclose(
                maths.advantage.advantages(rewards[:, order], **settings), got[:, order], atol=1e-9
            )
            for line, scores in zip(got, rewards, strict=True):
                assert (np.diff(line[np.argsort(scores, kind="stable")]) >= 0).all()
            if kind != "batch":
                alone = [maths.advantage.advantages(row[None], **settings)[0] for row in rewards]
                np.testing.assert_allclose(got, alone, rtol=1e-12, atol=0)


def test_special_cases_reduce_to_each_other(maths: Maths) -> None:
    settings = {"epsilon": 1e-4, "ddof": 1}
    pair = maths.advantage.advantages([[0.25, -1.5]], kind="leave_one_out", **settings)
    np.testing.assert_allclose(pair, [[1.75, -1.75]], rtol=1e-12)
    for rewards, _ in draws(4):
        size = rewards.shape[1]
        plain = maths.advantage.advantages(rewards, kind="mean_only", **settings)
        others = maths.advantage.advantages(rewards, kind="leave_one_out", **settings)
        np.testing.assert_allclose(others, plain * size / (size - 1), rtol=1e-12)
        one_group = rewards[-1:]
        np.testing.assert_allclose(
            maths.advantage.advantages(one_group, kind="batch", **settings),
            maths.advantage.advantages(one_group, kind="group", **settings),
            rtol=1e-12,
        )


def test_left_out_of_the_loss_is_not_left_out_of_the_baseline(maths: Maths) -> None:
    rewards = [[1.0, -1.0, -1.0, -1.0]]
    inside = maths.advantage.advantages(rewards, kind="group", epsilon=0.0, ddof=1)
    assert inside[0, 0] == pytest.approx(1.5)
    members = [[True, False, False, False]]
    for kind in KINDS:
        outside = maths.advantage.advantages(rewards, kind=kind, epsilon=1e-4, ddof=1, in_baseline=members)
        assert (outside == 0.0).all()


def test_what_is_out_of_the_baseline_has_no_influence(maths: Maths) -> None:
    for rewards, members in draws(5):
        changed = np.where(members, rewards, 1e3 * rewards - 77.0)
        for kind in KINDS:
            settings = {"kind": kind, "epsilon": 1e-4, "ddof": 1, "in_baseline": members}
            got = maths.advantage.advantages(rewards, **settings)
            np.testing.assert_array_equal(got, maths.advantage.advantages(changed, **settings))
            assert (got[~members] == 0.0).all()


def test_split_adds_up_and_is_linear(maths: Maths) -> None:
    rng = np.random.default_rng(6)
    for rewards, members in draws(7):
        bonus, penalty = rng.choice([0.0, 0.5], rewards.shape), -rng.choice([0.0, 0.5], rewards.shape)
        parts = {"level": rewards, "bonus": bonus, "penalty": penalty}
        total = (rewards + bonus) + penalty
        for kind in KINDS:
            for mask in (None, members):
                settings = {"kind": kind, "epsilon": 1e-4, "ddof": 1, "in_baseline": mask}
                split = maths.advantage.advantages_by_component(parts, **settings)
                whole = maths.advantage.advantages(total, **settings)
                assert list(split) == list(parts)
                np.testing.assert_allclose(sum(split.values()), whole, atol=1e-9)
                if kind == "mean_only" and mask is None:
                    silent = total.max(1) == total.min(1)
                    expected = np.where(silent[:, None], 0.0, bonus - bonus.mean(1, keepdims=True))
                    np.testing.assert_allclose(split["bonus"], expected, atol=1e-12)


def test_split_of_components_that_cancel(maths: Maths) -> None:
    parts = {"up": [[1.0, 0.0]], "down": [[0.0, 1.0]]}
    for kind in KINDS:
        split = maths.advantage.advantages_by_component(parts, kind=kind, epsilon=1e-4, ddof=1)
        assert all((part == 0.0).all() for part in split.values())


def test_zero_variance(maths: Maths) -> None:
    rewards = [[0.1] * 3, [0.1, 0.1, 0.1 + 1e-16], [0.0, 0.0, 1e-300]]
    assert maths.advantage.zero_variance(rewards).tolist() == [True, False, False]
    lonely = [[True, False, False], [False, False, False], [True, True, False]]
    different = [[1.0, 2.0, 3.0]] * 3
    assert maths.advantage.zero_variance(different, in_baseline=lonely).tolist() == [True, True, False]


def test_refusals(maths: Maths) -> None:
    good = {"kind": "group", "epsilon": 1e-4, "ddof": 1}
    refused = [
        ([[1.0]], {}, r"G >= 2, got \[1, 1\]"),
        ([1.0, 2.0], {}, r"\[B,G\]"),
        (np.zeros((0, 4)), {}, r"\[B,G\]"),
        ([[1.0, float("nan")]], {}, "nan at group 0, member 1"),
        ([[float("-inf"), 0.0]], {}, "-inf at group 0, member 0"),
        ([[1.0, 2.0]], {"in_baseline": [[1, 1]]}, "expected bool"),
        ([[1.0, 2.0]], {"in_baseline": [[True]]}, "expected bool"),
        ([[0.0, 1e-200]], {"epsilon": 0.0}, "overflow"),
        ([[-1.7e308, 1.7e308]], {}, "overflow"),
    ]
    for rewards, changed, message in refused:
        with pytest.raises(ValueError, match=message):
            maths.advantage.advantages(rewards, **{**good, **changed})
    with pytest.raises(ValueError, match="component 'b'"):
        maths.advantage.advantages_by_component({"a": [[1.0, 2.0]], "b": [[1.0, float("inf")]]}, **good)


def test_inputs_are_not_written_to(maths: Maths) -> None:
    rewards, members = np.array([[1.0, 2.0, 4.0]]), np.array([[True, True, False]])
    kept = rewards.copy()
    for kind in KINDS:
        maths.advantage.advantages(rewards, kind=kind, epsilon=1e-4, ddof=1, in_baseline=members)
        maths.advantage.advantages_by_component({"a": rewards, "b": rewards}, kind=kind, epsilon=1e-4, ddof=1)
        np.testing.assert_array_equal(rewards, kept)


# --- properties, on the module itself -----------------------------------------------------------------------

reward_tables = st.tuples(st.integers(1, 4), st.integers(2, 8)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-4, 4, width=32))
)


@settings(deadline=None)
@given(reward_tables, st.sampled_from(KINDS), st.sampled_from([0, 1]), st.sampled_from([1e-6, 1e-4, 1e-1]))
def test_any_rewards(rewards: np.ndarray, kind: str, ddof: int, epsilon: float) -> None:
    got = REAL.advantage.advantages(rewards, kind=kind, epsilon=epsilon, ddof=ddof)
    largest = max(1.0, float(np.abs(got).max()))
    assert np.abs(got.sum(axis=1)).max() <= 1e-8 * largest
    for line, scores in zip(got, rewards, strict=True):
        assert (np.diff(line[np.argsort(scores, kind="stable")]) >= 0).all()
    assert ((got == 0).all(axis=1) >= REAL.advantage.zero_variance(rewards)).all()
    size = rewards.shape[1]
    bound = np.sqrt(size - 1) if ddof == 0 else (size - 1) / np.sqrt(size)
    if kind == "group":  # no completion of a group can be further out, whatever its reward
        assert np.abs(got).max() <= bound + 1e-9


@settings(deadline=None)
@given(reward_tables, st.integers(-3, 3), st.data())
def test_scale_and_order_of_groups(rewards: np.ndarray, power: int, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(rewards)))))
    for kind in KINDS:
        got = REAL.advantage.advantages(rewards, kind=kind, epsilon=0.25, ddof=1)
        moved = REAL.advantage.advantages(rewards[order], kind=kind, epsilon=0.25, ddof=1)
        np.testing.assert_allclose(moved, got[order], rtol=1e-12, atol=1e-15)
        factor = 2.0**power
        scaled = REAL.advantage.advantages(factor * rewards, kind=kind, epsilon=factor * 0.25, ddof=1)
        unit = 1.0 if kind in ("group", "batch") else factor
        np.testing.assert_allclose(scaled, unit * got, rtol=1e-12, atol=1e-15)


def test_needs_no_torch() -> None:
    code = "import sys, grpo.advantage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
