"""Compare recorded and recomputed values bit for bit and measure how far apart they are."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_REPR_CHARS = 60


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that does not follow from the recorded inputs, or a file that was modified.

    >>> str(Difference(3, "ledger/step_000003.safetensors: rewards", "group 1, member 0", "1.0", "0.5", 1 << 52, 0.5))
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
    ulps: int | None = None
    """Distance in units in the last place; None unless both are finite numbers."""
    relative: float = 0.0
    """|logged − replayed| / max(|logged|, |replayed|)."""
    more: int = 0
    """Further differing tokens of the same row; ``ulps`` and ``relative`` are maxima over all of them."""

    def __str__(self) -> str:
        place = f"{self.where}{', ' if self.at else ''}{self.at}"
        distance = ""
        if self.ulps is not None:
            distance = f" ({self.ulps} ulp)" if self.ulps < 1000 else f" (relative {self.relative:.1e})"
        more = f" and {self.more:,} more of its tokens" if self.more else ""
        step = f"step {self.step}: " if self.step else ""
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


def ulps_between(a: Any, z: Any, dtype: Any = np.float64) -> int | None:
    """Return the number of floats of ``dtype`` from ``a`` to ``z``; None unless both are finite numbers.

    >>> ulps_between(1.0, 1.0000000000000002), ulps_between(-0.0, 0.0), ulps_between(1.0, None)
    (1, 0, None)
    >>> ulps_between(-5e-324, 5e-324)
    2
    """
    if not (_is_number(a) and _is_number(z)):
        return None
    width = np.dtype(dtype).itemsize
    sign = 1 << (8 * width - 1)
    ordered = []
    for value in (a, z):
        bits = int.from_bytes(np.array(value, dtype=dtype).astype(f"<f{width}").tobytes(), "little")
        ordered.append(sign - bits if bits & sign else bits)
    return abs(ordered[0] - ordered[1])


def difference_of(
    step: int, where: str, at: str, pairs: Sequence[tuple[Any, Any]], dtype: Any = np.float64
) -> Difference:
    """Return the difference at the first of several (logged, replayed) pairs whose bits differ."""
    floating = np.issubdtype(dtype, np.floating)
    ulps = [ulps_between(a, z, dtype) if floating else None for a, z in pairs]
    finite = [distance for distance in ulps if distance is not None]
    texts = short_repr(pairs[0][0]), short_repr(pairs[0][1])
    if len(finite) < len(pairs):
        return Difference(step, where, at, *texts, more=len(pairs) - 1)
    relative = max(abs(a - z) / (max(abs(a), abs(z)) or 1.0) for a, z in pairs)
    return Difference(step, where, at, *texts, max(finite), relative, len(pairs) - 1)


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
                yield difference_of(step, where, f"{name}{token}{suffix}", pairs, a.dtype)


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= 1 << 53
    return isinstance(value, float) and math.isfinite(value)
