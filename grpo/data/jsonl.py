"""JSONL: one case an object a line. The format that this program writes and that its own cases are in."""

import re
from collections.abc import Iterator
from string import whitespace
from typing import Any

from grpo.config import resolve
from grpo.data.csv_rows import numbered_lines
from grpo.data.row_report import MAX_TEXT, BadRow, Record, Remark
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards.safe_files import Unreadable, parse_json

TAG = re.compile(r"[\w.:+-]{1,40}")
MAX_TAGS = 20
"""A tag names a subset in ``eval.json``, which holds no text of a case: so it is a short name, and no sentence."""
INVISIBLE = whitespace + "\u00a0\u200b\u200c\u200d\u2060\ufeff"
"""Blanks and zero-width characters: around a patient's name they come from an export and make nobody another."""


def read_jsonl(name: str) -> Iterator[Record | Remark]:
    """Rows of a JSONL file: one object a line with ``id`` (text), ``text`` (the narrative), ``esi`` (1–5) and, if
    wanted, ``tags`` (list of short names, see `TAG`) and ``patient`` (text or whole number). Other fields are ignored:
    only ``text`` ever reaches a prompt. Empty lines are no rows.

    Raises:
        UserError: with file and line, for a file damaged as a file (see `numbered_lines`) and for a repeated id.
    """
    path = resolve(name)
    first_line: dict[str, int] = {}
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except BadRow as bad:
            yield Remark(path, number, bad.reason, detail=bad.detail)
            continue
        ident = record.case.id
        if ident in first_line:
            raise UserError(f"{path}:{number}: id {ident!r} was already used in line {first_line[ident]}")
        first_line[ident] = number
        yield record


def _record(line: str) -> Record:
    try:
        row: Any = parse_json(line)
    except Unreadable as error:
        raise BadRow("not_json", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"expected an object with id, text and esi, got a {type(row).__name__}")
    if missing := [key for key in ("id", "text", "esi") if key not in row]:
        raise BadRow("not_an_object", f"{' and '.join(missing)} missing: a case needs id, text and esi")
    ident, text, esi, tags, patient = row["id"], row["text"], row["esi"], row.get("tags", []), row.get("patient", "")
    if not isinstance(ident, str) or not 0 < len(ident) <= 200 or not ident.isprintable():
        raise BadRow("bad_field", "id must be printable text of 1 to 200 characters")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise BadRow("bad_field", f"text of case {ident!r} must be a narrative of 1 to {MAX_TEXT:,} characters")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise BadRow("bad_field", f"text of case {ident!r} holds a NUL or half a surrogate pair: re-export the file")
    if type(esi) is not int or not 1 <= esi <= 5:
        raise BadRow("bad_field", f"esi of case {ident!r} must be a whole number from 1 to 5, got {_shown(esi)}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags):
        raise BadRow(
            "bad_field",
            f"tags of case {ident!r} must be a list of names of at most 40 letters, digits and _ . : + -, no blanks",
        )
    if len(tags) > MAX_TAGS:
        raise BadRow("bad_field", f"tags of case {ident!r}: {len(tags)} of them, at most {MAX_TAGS} are read")
    if type(patient) not in (str, int) or len(str(patient)) > 200:
        raise BadRow("bad_field", f"patient of case {ident!r} must be a text of at most 200 characters or a number")
    if not (patient := str(patient).strip(INVISIBLE)).isprintable():
        raise BadRow(
            "bad_field", f"patient of case {ident!r} holds an invisible character: one patient could pass for two"
        )
    return Record(Case(ident, text.strip(), esi, tuple(tags)), patient)


def _shown(value: object) -> str:
    """A value that is short enough not to be a narrative in the wrong field."""
    return repr(value) if len(repr(value)) <= 12 else f"a {type(value).__name__}"
