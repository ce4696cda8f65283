"""Load cases, and choose those of each step as a pure function of (seed, step)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from grpo.data.jsonl import read_jsonl
from grpo.data.mietic import read_validate
from grpo.data.mimic_iv_ed import read_mimic_iv_ed
from grpo.data.row_report import Loaded, Row, read_rows
from grpo.runtime.seeds import stable_seed
from grpo.types import Case

LOADERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "mietic-validate": read_validate,
    "mimic-iv-ed": read_mimic_iv_ed,
}
"""Format → reader, which yields one row at a time."""


def load_cases(loader: str, name: str, *, strict: bool) -> Loaded:
    """Return the cases of a file and a report on every row that did not become one.

    Args:
        loader: a key of `LOADERS`, used if ``name`` has no loader prefix.
        name: the file, or the folder for mimic-iv-ed; a prefix as in ``mietic-validate:FILE`` selects the loader.
        strict: refuse the file if any row is faulty, instead of dropping that row. Rows that the format itself excludes
            (MIETIC's unretained ones) are not faulty.

    Raises:
        UserError: the file is damaged or empty, cases have no gold level, or, if ``strict``, any row is faulty.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix in LOADERS:
        loader, name = prefix, rest
    return read_rows(name, LOADERS[loader](name), strict=strict)


def load_jsonl_cases(name: str) -> tuple[Case, ...]:
    """Return the cases of a JSONL file, refusing any faulty row (see `read_jsonl`).

    Raises:
        UserError: a line is not a case, an id is repeated, or the file is empty; gives file and line.
    """
    return load_cases("jsonl", name, strict=True).cases


def oversampled_indices(cases: Sequence[Case], oversample: Mapping[int, int]) -> tuple[int, ...]:
    """Return indices into ``cases``, each repeated as often as its level is oversampled: one unshuffled epoch.

    >>> cases = [Case("a", "...", 1), Case("b", "...", 3)]
    >>> oversampled_indices(cases, {1: 5})
    (0, 0, 0, 0, 0, 1)
    """
    return tuple(i for i, case in enumerate(cases) for _ in range(oversample.get(case.gold_level, 1)))


def cases_for_step(
    cases: Sequence[Case], epoch: Sequence[int], *, seed: int, step: int, count: int
) -> tuple[Case, ...]:
    """Return the ``count`` cases of a step (0-based): shuffled epochs are concatenated and divided into steps.

    Each entry of ``epoch`` (see `oversampled_indices`) occurs once per epoch. The shuffle of epoch e depends only on
    (seed, e), so resuming needs no state.
    """
    size = len(epoch)
    return tuple(
        cases[epoch[_order(seed, position // size, size)[position % size]]]
        for position in range(step * count, (step + 1) * count)
    )


def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=stable_seed("order", seed, epoch))).permutation(size)
