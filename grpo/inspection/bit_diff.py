"""Two values held against each other, bit for bit, and how far apart they are."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST = 60
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that does not follow from what was recorded, or a file that is not what was written.

    >>> str(Difference(3, "ledger/step_000003.safetensors: rewards", "group 1, member 0", "1.0", "0.5", 1 << 52, 0.5))
    'step 3: ledger/step_000003.safetensors: rewards, group 1, member 0: 1.0 → 0.5 (relative 5.0e-01)'
    """

    step: int
    """0: the run as a whole."""
    where: str
    """File and, after a colon, tensor, field or metric."""
    at: str
    """Row and token; "" for what concerns a whole step."""
    logged: str
    replayed: str
    ulps: int | None = None
    """Between two finite numbers, in units of the last place of their type."""
    relative: float = 0.0
    """|logged − replayed| over the larger magnitude."""
    more: int = 0
    """Further tokens of the same row that differ; ``ulps`` and ``relative`` are the largest of them all."""

    def __str__(self) -> str:
        place = f"{self.where}{', ' if self.at else ''}{self.at}"
        far = ""
        if self.ulps is not None:
            far = f" ({self.ulps} ulp)" if self.ulps < 1000 else f" (relative {self.relative:.1e})"
        more = f" and {self.more:,} more of its tokens" if self.more else ""
        step = f"step {self.step}: " if self.step else ""
        return f"{step}{place}: {self.logged} → {self.replayed}{far}{more}"


def same(logged: Any, replayed: Any) -> bool:
    """Whether two JSON values are one to the bit: 1 is not 1.0, 0.0 is not −0.0, NaN is NaN.

    >>> same(0.1 + 0.2, 0.3), same(1, 1.0), same(None, None), same(float("nan"), float("nan"))
    (False, False, True, True)
    """
    return json.dumps(logged) == json.dumps(replayed)


def shown(value: Any) -> str:
    """A value for people: floats with every digit that tells them apart, long things cut short."""
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def ulps_between(a: Any, z: Any, dtype: Any = np.float64) -> int | None:
    """How many floats of that type lie from ``a`` to ``z``; None where one of them is no finite number.

    >>> ulps_between(1.0, 1.0000000000000002), ulps_between(-0.0, 0.0), ulps_between(1.0, None)
    (1, 0, None)
    >>> ulps_between(-5e-324, 5e-324)
    2
    """
    if not (_is_number(a) and _is_number(z)):
        return None
    width = np.dtype(dtype).itemsize
    top = 1 << (8 * width - 1)
    ordered = []
    for value in (a, z):
        bits = int.from_bytes(np.array(value, dtype=dtype).astype(f"<f{width}").tobytes(), "little")
        ordered.append(top - bits if bits & top else bits)
    return abs(ordered[0] - ordered[1])


def relative_to(a: float, z: float) -> float:
    """|a − z| over the larger magnitude; 0.0 for two zeros.

    >>> relative_to(1.0, -4.0), relative_to(0.0, 0.0)
    (1.25, 0.0)
    """
    largest = max(abs(a), abs(z))
    return abs(a - z) / largest if largest else 0.0


def scalar_difference(step: int, where: str, logged: Any, replayed: Any) -> Difference:
    """Of two values that `same` tells apart."""
    ulps = ulps_between(logged, replayed)
    return Difference(
        step, where, "", shown(logged), shown(replayed), ulps, 0.0 if ulps is None else relative_to(logged, replayed)
    )


def array_differences(
    step: int, where: str, logged: Any, replayed: Any, places: Sequence[tuple[str, slice]]
) -> Iterator[Difference]:
    """A difference for each stretch of an array that holds another bit, at its first other value.

    Args:
        logged, replayed: [M] or [E,M], as tensors or arrays; None where there is none.
        places: (name, slice) of the stretches that make up M: one a completion.

    >>> str(*array_differences(1, "loss", np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 4.0]), [("row 0", slice(3))]))
    'step 1: loss, row 0, token 1: 2.0 → 2.5 (relative 2.5e-01) and 1 more of its tokens'
    """
    if logged is None or replayed is None:
        if logged is not replayed:
            logged_state, replayed_state = ("absent" if one is None else "there" for one in (logged, replayed))
            yield Difference(step, where, "", logged_state, replayed_state)
        return
    a, z = np.ascontiguousarray(logged), np.ascontiguousarray(replayed)
    if (a.dtype, a.shape) != (z.dtype, z.shape):
        yield Difference(step, where, "", f"{a.dtype} {list(a.shape)}", f"{z.dtype} {list(z.shape)}")
        return
    apart = _bits(a) != _bits(z)
    for epoch, row in enumerate(np.atleast_2d(apart)):
        inner = f", inner epoch {epoch + 1}" if a.ndim == 2 and len(a) > 1 else ""
        for name, place in places if row.any() else ():
            indices = np.flatnonzero(row[place])
            if len(indices):
                token = f", token {indices[0]}" if len(row[place]) > 1 else ""
                pairs = [tuple(np.atleast_2d(one)[epoch, place][i].item() for one in (a, z)) for i in indices]
                yield _farthest(step, where, f"{name}{token}{inner}", pairs, a.dtype)


def _farthest(step: int, where: str, at: str, pairs: Sequence[tuple[Any, ...]], dtype: Any) -> Difference:
    ulps: list[int | None] = [None]
    if np.issubdtype(dtype, np.floating):
        ulps = [ulps_between(a, z, dtype) for a, z in pairs]
    finite = [one for one in ulps if one is not None]
    known = len(finite) == len(pairs)
    relative = max(relative_to(a, z) for a, z in pairs) if known else 0.0
    first = pairs[0]
    return Difference(
        step, where, at, shown(first[0]), shown(first[1]), max(finite) if known else None, relative, len(pairs) - 1
    )


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= 1 << 53
    return isinstance(value, float) and math.isfinite(value)
