"""Advantages: how much better a completion did than the others of its prompt. NumPy only.

Every variant is `(reward - group mean) / divisor` and differs from the others only in the divisor. The split by reward
component is therefore exact: each component is centered on its own group mean and divided by the divisor of the total.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Divisor = Callable[[Floats, Bools, float, int], Floats]


def _center(values: Floats, baseline_mask: Bools) -> Floats:
    counts = np.maximum(baseline_mask.sum(axis=1, keepdims=True), 1)
    means = np.where(baseline_mask, values, 0.0).sum(axis=1, keepdims=True) / counts
    return np.where(baseline_mask, values - means, 0.0)


def group_divisor(rewards: Floats, baseline_mask: Bools, epsilon: float, ddof: int) -> Floats:
    """Std of the group + epsilon, [B,1] (GRPO: DeepSeekMath, arXiv 2402.03300, which has no epsilon).

    >>> group_divisor(np.array([[1.0, 3.0]]), np.array([[True, True]]), epsilon=0.5, ddof=0)
    array([[1.5]])
    """
    counts = baseline_mask.sum(axis=1, keepdims=True)
    squares = (_center(rewards, baseline_mask) ** 2).sum(axis=1, keepdims=True)
    return np.sqrt(squares / np.maximum(counts - ddof, 1)) + epsilon


def unit_divisor(rewards: Floats, baseline_mask: Bools, epsilon: float, ddof: int) -> Floats:
    """One, [B,1]: the centered reward itself (Dr. GRPO, arXiv 2503.20783). epsilon and ddof have no effect.

    >>> unit_divisor(np.array([[1.0, 3.0]]), np.array([[True, True]]), epsilon=0.5, ddof=0)
    array([[1.]])
    """
    return np.ones((len(rewards), 1))


def batch_divisor(rewards: Floats, baseline_mask: Bools, epsilon: float, ddof: int) -> Floats:
    """Std of all rewards of the batch around the batch's mean, + epsilon, [B,1] (Lite PPO, arXiv 2508.08221).

    >>> batch_divisor(np.array([[1.0, 1.0], [3.0, 3.0]]), np.ones((2, 2), bool), epsilon=0.5, ddof=0)
    array([[1.5],
           [1.5]])
    """
    flat = group_divisor(rewards.reshape(1, -1), baseline_mask.reshape(1, -1), epsilon, ddof)
    return np.repeat(flat, len(rewards), axis=0)


def leave_one_out_divisor(rewards: Floats, baseline_mask: Bools, epsilon: float, ddof: int) -> Floats:
    """(G - 1)/G, [B,1]: the reward minus the mean of the *others* (RLOO, arXiv 2402.14740).

    G counts the completions in the baseline. epsilon and ddof have no effect.

    >>> leave_one_out_divisor(np.array([[1.0, 3.0]]), np.array([[True, True]]), epsilon=0.5, ddof=0)
    array([[0.5]])
    """
    counts = np.maximum(baseline_mask.sum(axis=1, keepdims=True), 2)
    return (counts - 1) / counts


ADVANTAGES: dict[str, Divisor] = {
    "group": group_divisor,
    "mean_only": unit_divisor,
    "batch": batch_divisor,
    "leave_one_out": leave_one_out_divisor,
}


def advantages(
    rewards: ArrayLike,
    *,
    kind: str,
    epsilon: float,
    ddof: int,
    in_baseline: ArrayLike | None = None,
) -> Floats:
    """A = (r - group mean)/divisor, [B,G] float64; the divisor is `ADVANTAGES[kind]`.

    Args:
        rewards: [B,G] finite, one row per group (the completions of one prompt), G >= 2.
        kind: "group" divides by the group's std + epsilon, "batch" by the batch's std + epsilon, "mean_only" by 1,
            "leave_one_out" by (G - 1)/G.
        epsilon: >= 0, in units of reward, added to the std after the root.
        ddof: 1 divides the squares by n - 1 (as TRL and v49 do), 0 by n. One success among eight has an
            advantage of 2.474 with ddof 1 and 2.645 with ddof 0 (epsilon 1e-4).
        in_baseline: [B,G] bool. Completions marked False count in neither mean nor std and get 0. By default
            every completion counts, including those that the loss masks out (as in TRL).

    A group whose rewards are all equal (max == min, not std == 0, which rounding can miss) gets exactly 0.0; so
    does one with fewer than two completions in the baseline.

    Raises:
        ValueError: shape not [B,G], G < 2, non-finite rewards, or a result that overflows. `grpo.config` checks the
            settings.

    >>> advantages([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]], kind="group", epsilon=0.0, ddof=1)
    array([[-1.,  0.,  1.],
           [ 0.,  0.,  0.]])
    >>> advantages([[0.0, 3.0, 9.0]], kind="mean_only", epsilon=0.0, ddof=1, in_baseline=[[True, True, False]])
    array([[-1.5,  1.5,  0. ]])
    """
    matrix = _reward_matrix(rewards, "rewards")
    baseline_mask = _baseline_mask(in_baseline, matrix)
    return _normalize({"reward": matrix}, matrix, baseline_mask, kind, epsilon, ddof)["reward"]


def advantages_by_component(
    components: Mapping[str, ArrayLike],
    *,
    kind: str,
    epsilon: float,
    ddof: int,
    in_baseline: ArrayLike | None = None,
    total: ArrayLike | None = None,
) -> dict[str, Floats]:
    """A_k = (r_k - group mean of r_k)/divisor of the total reward: the part of A due to component k.

    Args:
        components: name -> [B,G] finite, already weighted; the total reward is their sum.
        total: [B,G], that sum as the reward computed it; by default the components are added in the order of the
            mapping. Rounding in another order can make equal totals differ, which would give a uniform group variance.
        kind, epsilon, ddof, in_baseline: as in `advantages`.

    The parts add up to `advantages(total)`. If the total does not vary within a group, every part is 0.0, even if
    components cancel out: there is no advantage to split.

    Raises:
        ValueError: as in `advantages`.

    >>> parts = {"level": [[1.0, 0.0]], "rule": [[0.5, 0.5]]}
    >>> advantages_by_component(parts, kind="mean_only", epsilon=0.0, ddof=1)
    {'level': array([[ 0.5, -0.5]]), 'rule': array([[0., 0.]])}
    """
    parts = {name: _reward_matrix(values, f"component {name!r}") for name, values in components.items()}
    whole = _reward_matrix(sum(parts.values()) if total is None else total, "total")
    return _normalize(parts, whole, _baseline_mask(in_baseline, whole), kind, epsilon, ddof)


def zero_variance(rewards: ArrayLike, *, in_baseline: ArrayLike | None = None) -> Bools:
    """Return [B] bool, True for groups with max == min, whose advantages are all exactly 0.

    Args:
        rewards: [B,G] finite, G >= 2.
        in_baseline: as in `advantages`; a group with fewer than two completions in the baseline is True.

    Raises:
        ValueError: as in `advantages`.

    >>> zero_variance([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]])
    array([ True, False])
    """
    matrix = _reward_matrix(rewards, "rewards")
    return _zero_variance(matrix, _baseline_mask(in_baseline, matrix))


def _zero_variance(rewards: Floats, baseline_mask: Bools) -> Bools:
    highest = np.where(baseline_mask, rewards, -np.inf).max(axis=1)
    lowest = np.where(baseline_mask, rewards, np.inf).min(axis=1)
    return np.asarray(highest <= lowest, dtype=np.bool_)  # an empty group has -inf <= inf


def _normalize(
    parts: Mapping[str, Floats], total: Floats, baseline_mask: Bools, kind: str, epsilon: float, ddof: int
) -> dict[str, Floats]:
    uniform = _zero_variance(total, baseline_mask)[:, None]
    with np.errstate(all="ignore"):  # overflow is reported below
        divisor = np.where(uniform, 1.0, ADVANTAGES[kind](total, baseline_mask, epsilon, ddof))
        normalized = {
            name: np.where(uniform, 0.0, _center(part, baseline_mask) / divisor) for name, part in parts.items()
        }
    for values in (divisor, *normalized.values()):
        if not np.isfinite(values).all():
            group = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"the advantages of group {group} overflow; check the scale of the rewards")
    return normalized


def _reward_matrix(values: ArrayLike, name: str) -> Floats:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 1 or matrix.shape[1] < 2:
        raise ValueError(f"{name}: expected shape [B,G] with B >= 1 and G >= 2, got {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        group, member = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"{name}: expected finite values, got {matrix[group, member]} at group {group}, member {member}"
        )
    return matrix


def _baseline_mask(in_baseline: ArrayLike | None, rewards: Floats) -> Bools:
    if in_baseline is None:
        return np.ones(rewards.shape, dtype=np.bool_)
    baseline_mask = np.asarray(in_baseline)
    if baseline_mask.dtype != np.bool_ or baseline_mask.shape != rewards.shape:
        raise ValueError(
            f"in_baseline: expected bool {list(rewards.shape)}, got {baseline_mask.dtype} {list(baseline_mask.shape)}"
        )
    return baseline_mask
