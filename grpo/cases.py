"""Files → `Case`s, and the order in which training meets them: a pure function of (seed, step)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from grpo.data.jsonl import read_jsonl
from grpo.data.mietic import read_instructions, read_validate
from grpo.data.mimic_iv_ed import read_mimic_iv_ed
from grpo.data.row_report import Loaded, Row, gather
from grpo.types import Case

LOADERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "mietic-validate": read_validate,
    "mietic-instructions": read_instructions,
    "mimic-iv-ed": read_mimic_iv_ed,
}
"""Format → reader. A reader yields rows one by one; `load` is the same as tuples."""


def load(loader: str, name: str, *, strict: bool) -> Loaded:
    """The cases of a file and the account of every row that did not become one.

    Args:
        loader: a key of `LOADERS`, for a name that brings none of its own.
        name: the file, or the folder for mimic-iv-ed; ``mietic-validate:FILE`` names its loader.
        strict: refuse the file for any faulty row instead of leaving it out. Rows that the format itself sets aside
            (MIETIC's unretained) are no fault.

    Raises:
        UserError: a damaged or empty file, cases without gold levels, under ``strict`` any fault.
    """
    own, colon, rest = name.partition(":")
    if colon and own in LOADERS:
        loader, name = own, rest
    return gather(name, LOADERS[loader](name), strict=strict)


def load_jsonl(name: str) -> tuple[Case, ...]:
    """Cases of a JSONL file, strictly (see `read_jsonl`).

    Raises:
        UserError: with file and line, for the first line that is no case, a repeated id, or an empty file.
    """
    return load("jsonl", name, strict=True).cases


def stream(cases: Sequence[Case], oversample: Mapping[int, int]) -> tuple[int, ...]:
    """Indices into ``cases``, each as often as its level is oversampled: one epoch of training, unshuffled.

    >>> cases = [Case("a", "...", 1), Case("b", "...", 3)]
    >>> stream(cases, {1: 5})
    (0, 0, 0, 0, 0, 1)
    """
    return tuple(i for i, case in enumerate(cases) for _ in range(oversample.get(case.esi, 1)))


def cases_for_step(
    cases: Sequence[Case], epoch: Sequence[int], *, seed: int, step: int, count: int
) -> tuple[Case, ...]:
    """The ``count`` cases of a step (0-based): the shuffled epochs laid end to end and cut into steps.

    Every entry of ``epoch`` (see `stream`) is met once an epoch; the shuffle of epoch e depends on (seed, e) alone, so
    resuming needs no state.
    """
    size = len(epoch)
    return tuple(
        cases[epoch[_order(seed, position // size, size)[position % size]]]
        for position in range(step * count, (step + 1) * count)
    )


def row_key(*parts: int | str) -> int:
    """A 128-bit key of named parts for counter-based noise: equal parts, equal key; no part can imitate another.

    >>> row_key(0, 1, "a", 2) == row_key(0, 1, "a", 2) != row_key(0, 1, "a2")
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = f"{type(part).__name__}:{part}".encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=row_key("order", seed, epoch))).permutation(size)
