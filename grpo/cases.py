"""Files → `Case`s, and the order in which training meets them: a pure function of (seed, step)."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import resolve
from grpo.types import Case

MAX_TEXT = 100_000
"""Characters. A longer narrative is a broken file, not a patient."""


class CaseError(ValueError):
    """A case file that cannot be used. Names file, line and field, never a narrative."""


def load_jsonl(name: str) -> tuple[Case, ...]:
    """Cases of a JSONL file: one object a line with ``id`` (text), ``text`` (the narrative), ``esi`` (1–5) and,
    if wanted, ``tags`` (list of texts). Other fields are ignored: only ``text`` ever reaches a prompt.

    Raises:
        CaseError: with file and line, for the first line that is not such an object, a repeated id, or an empty file.
    """
    path = resolve(name)
    cases: list[Case] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        case = _case(f"{path}:{number}", line)
        if case.id in first_line:
            raise CaseError(f"{path}:{number}: id {case.id!r} was already used in line {first_line[case.id]}")
        first_line[case.id] = number
        cases.append(case)
    if not cases:
        raise CaseError(f"{path}: no cases in it: expected one JSON object a line with id, text and esi")
    return tuple(cases)


LOADERS = {"jsonl": load_jsonl}


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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise CaseError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line)") from None
    except OSError as error:
        raise CaseError(f"{path}: cannot be read: {error.strerror}") from None


def _case(where: str, line: str) -> Case:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise CaseError(f"{where}: not valid JSON: {what}") from None
    if not isinstance(row, dict):
        raise CaseError(f"{where}: expected an object with id, text and esi, got a {type(row).__name__}")
    if missing := [key for key in ("id", "text", "esi") if key not in row]:
        raise CaseError(f"{where}: {' and '.join(missing)} missing: a case needs id, text and esi")
    ident, text, esi, tags = row["id"], row["text"], row["esi"], row.get("tags", [])
    if not isinstance(ident, str) or not 0 < len(ident) <= 200 or not ident.isprintable():
        raise CaseError(f"{where}: id must be printable text of 1 to 200 characters")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise CaseError(f"{where}: text of case {ident!r} must be a narrative of 1 to {MAX_TEXT:,} characters")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise CaseError(f"{where}: text of case {ident!r} holds a NUL or half a surrogate pair: re-export the file")
    if type(esi) is not int or not 1 <= esi <= 5:
        raise CaseError(f"{where}: esi of case {ident!r} must be a whole number from 1 to 5, got {esi!r:.40}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise CaseError(f"{where}: tags of case {ident!r} must be a list of texts")
    return Case(ident, text.strip(), esi, tuple(tags))
