"""The maths once more, from the papers, with loops and floats; imports nothing of the project.

Rows are ragged lists: there is no padding here that could be handled wrongly.
"""

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]
Rows = Sequence[Row]


# --- advantage ----------------------------------------------------------------------------------------------


def mean(values: Row) -> float:
    return math.fsum(values) / len(values)


def std(values: Row, ddof: int) -> float:
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - ddof))


def advantages(
    rewards: Rows, kind: str, epsilon: float, ddof: int, members: Sequence[Sequence[bool]]
) -> list[list[float]]:
    """DeepSeekMath 2402.03300, Dr. GRPO 2503.20783 ("mean_only"), Lite PPO 2508.08221, RLOO 2402.14740."""
    everyone = [r for row, inside in zip(rewards, members, strict=True) for r, m in zip(row, inside, strict=True) if m]
    result = []
    for row, inside in zip(rewards, members, strict=True):
        counted = [r for r, m in zip(row, inside, strict=True) if m]
        line = []
        for i, r in enumerate(row):
            if not inside[i] or len(counted) < 2 or all(c == counted[0] for c in counted):
                line.append(0.0)
            elif kind == "group":
                line.append((r - mean(counted)) / (std(counted, ddof) + epsilon))
            elif kind == "mean_only":
                line.append(r - mean(counted))
            elif kind == "batch":
                line.append((r - mean(counted)) / (std(everyone, ddof) + epsilon))
            elif kind == "leave_one_out":
                others = [row[j] for j in range(len(row)) if j != i and inside[j]]
                line.append(r - mean(others))
            else:
                raise AssertionError(kind)
        result.append(line)
    return result


# --- loss ---------------------------------------------------------------------------------------------------


def objective(
    surrogate: str,
    row: Row,
    old: Row,
    advantage: float,
    t: int,
    low: float,
    high: float,
    dual: float | None,
    frozen: Row,
) -> float:
    """What token t of one row adds to the objective; `frozen` stands where a paper stops the gradient."""
    ratio = math.exp(row[t] - old[t])
    if surrogate == "none":
        return ratio * advantage
    if surrogate == "cispo":
        weight = min(math.exp(frozen[t] - old[t]), 1 + high)
        return weight * advantage * row[t]
    if surrogate == "gspo":
        ratio = math.exp(sum(row[s] - old[s] for s in range(len(row))) / len(row))
    bounded = min(max(ratio, 1 - low), 1 + high)
    value = min(ratio * advantage, bounded * advantage)
    if surrogate == "dual_clip" and advantage < 0:
        assert dual is not None
        value = max(value, dual * advantage)
    return value


def kl_value(estimator: str, logprob: float, old: float, ref: float) -> float:
    r = math.exp(ref - logprob)
    if estimator == "k1":
        return -math.log(r)
    if estimator == "k2":
        return math.log(r) ** 2 / 2
    k3 = (r - 1) - math.log(r)
    return k3 if estimator == "k3" else math.exp(logprob - old) * k3


def loss(
    rows: Rows,
    old: Rows,
    ref: Rows | None,
    advantage: Row,
    weights: Row,
    surrogate: str,
    low: float,
    high: float,
    dual: float | None,
    kl: str,
    beta: float,
    frozen: Rows | None = None,
) -> list[list[float]]:
    """Each token's contribution; the loss is the sum. weights: one per completion, for each of its tokens."""
    frozen = rows if frozen is None else frozen
    result = []
    for i, row in enumerate(rows):
        line = []
        for t in range(len(row)):
            value = -objective(surrogate, row, old[i], advantage[i], t, low, high, dual, frozen[i])
            if beta > 0:
                assert ref is not None
                value += beta * kl_value(kl, row[t], old[i][t], ref[i][t])
            line.append(weights[i] * value)
        result.append(line)
    return result


def total(lines: Rows) -> float:
    return math.fsum(v for line in lines for v in line)


def slope(function: Callable[[list[list[float]]], float], rows: Rows, step: float = 1e-5) -> list[list[float]]:
    """Central differences of a function of ragged rows."""
    result = []
    for i, row in enumerate(rows):
        line = []
        for t in range(len(row)):
            up, down = [list(r) for r in rows], [list(r) for r in rows]
            up[i][t] += step
            down[i][t] -= step
            line.append((function(up) - function(down)) / (2 * step))
        result.append(line)
    return result


def clipped(
    surrogate: str, row: Row, old: Row, advantage: float, t: int, low: float, high: float, dual: float | None
) -> tuple[bool, bool]:
    """(low, high): where clipping took the gradient; for CISPO, where it capped the weight."""
    ratio = math.exp(row[t] - old[t])
    if surrogate == "none":
        return False, False
    if surrogate == "cispo":
        return False, ratio > 1 + high
    if surrogate == "gspo":
        ratio = math.exp(sum(a - b for a, b in zip(row, old, strict=True)) / len(row))
    is_low = advantage < 0 and ratio < 1 - low
    is_high = advantage > 0 and ratio > 1 + high
    if surrogate == "dual_clip":
        assert dual is not None
        is_high = is_high or (advantage < 0 and ratio > dual)
    return is_low, is_high


def token_weights(lengths: Sequence[int], kind: str, max_new_tokens: int, include: Sequence[bool]) -> list[float]:
    """GRPO 2402.03300 ("sequence"), DAPO 2503.14476 ("token"), Dr. GRPO 2503.20783 ("constant")."""
    kept = [length for length, inside in zip(lengths, include, strict=True) if inside]
    result = []
    for length, inside in zip(lengths, include, strict=True):
        if not inside:
            result.append(0.0)
        elif kind == "sequence":
            result.append(1 / len(kept) / length)
        elif kind == "token":
            result.append(1 / sum(kept))
        else:
            result.append(1 / len(kept) / max_new_tokens)
    return result


# --- log-probabilities --------------------------------------------------------------------------------------


def log_softmax(logits: Row, temperature: float) -> list[float]:
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - log_sum for z in scaled]


def entropy(log_p: Row) -> float:
    return -math.fsum(math.exp(v) * v for v in log_p)


def logits(hidden: Row, head: Rows, bias: Row | None) -> list[float]:
    products = [math.fsum(h * w for h, w in zip(hidden, line, strict=True)) for line in head]
    return products if bias is None else [z + b for z, b in zip(products, bias, strict=True)]


def logprob_slope(hidden: Row, head: Rows, bias: Row | None, target: int, temperature: float) -> list[float]:
    """∂ log p[target]/∂hidden = (W[target] - Σ_v p_v W[v])/temperature."""
    p = [math.exp(v) for v in log_softmax(logits(hidden, head, bias), temperature)]
    return [
        (head[target][k] - math.fsum(p[v] * head[v][k] for v in range(len(head)))) / temperature
        for k in range(len(hidden))
    ]


# --- KL of an enumerable distribution ----------------------------------------------------------------------


def kl_divergence(log_p: Row, log_q: Row) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def reverse_kl_slope(log_p: Row, log_ref: Row) -> list[float]:
    """∂ KL(p || ref)/∂logit_v = p_v (log p_v - log ref_v - KL)."""
    divergence = kl_divergence(log_p, log_ref)
    return [math.exp(a) * (a - b - divergence) for a, b in zip(log_p, log_ref, strict=True)]


def forward_kl_slope(log_p: Row, log_ref: Row) -> list[float]:
    """∂ KL(ref || p)/∂logit_v = p_v - ref_v."""
    return [math.exp(a) - math.exp(b) for a, b in zip(log_p, log_ref, strict=True)]
