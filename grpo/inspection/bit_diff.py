"""Compare recorded and recomputed values bit for bit and measure how far apart they are."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_REPR_CHARS = 60


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that does not follow from the recorded inputs, or a file that was modified.

    >>> str(Difference(3, "ledger/step_000003.safetensors: rewards", "group 1, member 0", "1.0", "0.5", 0.5))
    'step 3: ledger/step_000003.safetensors: rewards, group 1, member 0: 1.0 → 0.5 (relative 5.0e-01)'
    """

    step: int
    """0: the run as a whole."""
    where: str
    """File and, after a colon, tensor, field or metric."""
    at: str
    """Row and token; "" for the whole step."""
    logged: str
    replayed: str
    relative: float | None = None
    """|logged − replayed| / max(|logged|, |replayed|); None unless both are finite numbers."""
    more: int = 0
    """Further differing tokens of the same row; ``relative`` is the maximum over all of them."""

    def __str__(self) -> str:
        step = f"step {self.step}: " if self.step else ""
        place = f"{self.where}{', ' if self.at else ''}{self.at}"
        distance = "" if self.relative is None else f" (relative {self.relative:.1e})"
        more = f" and {self.more:,} more of its tokens" if self.more else ""
        return f"{step}{place}: {self.logged} → {self.replayed}{distance}{more}"


def same_bits(logged: Any, replayed: Any) -> bool:
    """Return whether two JSON values are identical: 1 differs from 1.0 and 0.0 from −0.0, but NaN equals NaN.

    >>> same_bits(0.1 + 0.2, 0.3), same_bits(1, 1.0), same_bits(None, None), same_bits(float("nan"), float("nan"))
    (False, False, True, True)
    """
    return json.dumps(logged) == json.dumps(replayed)


def short_repr(value: Any) -> str:
    """Return the repr, with all significant digits of a float, cut to `MAX_REPR_CHARS` characters."""
    text = repr(value)
    return text if len(text) <= MAX_REPR_CHARS else text[: MAX_REPR_CHARS - 1] + "…"


def relative_distance(a: Any, z: Any) -> float | None:
    """Return |a − z| / max(|a|, |z|), at most 2; None unless both are finite numbers.

    >>> relative_distance(2.0, 2.5), relative_distance(-0.0, 0.0), relative_distance(1.0, None)
    (0.2, 0.0, None)
    """
    largest = sys.float_info.max
    for value in (a, z):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -largest <= value <= largest:
            return None
    return float(min(abs(a - z) / (max(abs(a), abs(z)) or 1.0), 2.0))


def difference_of(step: int, where: str, at: str, pairs: Sequence[tuple[Any, Any]]) -> Difference:
    """Return the difference at the first of several (logged, replayed) pairs whose bits differ."""
    distances = [distance for a, z in pairs if (distance := relative_distance(a, z)) is not None]
    relative = max(distances) if len(distances) == len(pairs) else None
    return Difference(step, where, at, short_repr(pairs[0][0]), short_repr(pairs[0][1]), relative, len(pairs) - 1)


def array_differences(
    step: int, where: str, logged: Any, replayed: Any, places: Sequence[tuple[str, slice]]
) -> Iterator[Difference]:
    """Yield one difference for each place of an array in which a bit differs.

    Args:
        logged, replayed: [M] or [E,M] tensors or arrays; None if absent.
        places: (name, slice of M) of each completion.

    >>> str(*array_differences(1, "loss", np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 4.0]), [("row 0", slice(3))]))
    'step 1: loss, row 0, token 1: 2.0 → 2.5 (relative 2.5e-01) and 1 more of its tokens'
    """
    if logged is None or replayed is None:
        if logged is not replayed:
            sides = ("absent", "present") if logged is None else ("present", "absent")
            yield Difference(step, where, "", *sides)
        return
    a, z = np.ascontiguousarray(logged), np.ascontiguousarray(replayed)
    if (a.dtype, a.shape) != (z.dtype, z.shape):
        yield Difference(step, where, "", f"{a.dtype} {list(a.shape)}", f"{z.dtype} {list(z.shape)}")
        return
    a, z = np.atleast_2d(a), np.atleast_2d(z)
    for epoch, differs in enumerate(a.view(f"u{a.dtype.itemsize}") != z.view(f"u{z.dtype.itemsize}")):
        suffix = f", inner epoch {epoch + 1}" if len(a) > 1 else ""
        for name, place in places if differs.any() else ():
            tokens = np.flatnonzero(differs[place])
            if len(tokens):
                token = f", token {tokens[0]}" if len(differs[place]) > 1 else ""
                pairs = [(a[epoch, place][t].item(), z[epoch, place][t].item()) for t in tokens]
                yield difference_of(step, where, f"{name}{token}{suffix}", pairs)
