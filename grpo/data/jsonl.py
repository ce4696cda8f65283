"""Load JSONL: one case per line. This is also the format that `grpo prepare` writes."""

import re
from collections.abc import Iterator
from string import whitespace
from typing import Any

from grpo.config import resolve_path
from grpo.data.csv_rows import numbered_lines
from grpo.data.row_report import MAX_TEXT, BadRow, CaseRow, RowNote
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards.safe_files import InvalidFile, parse_json

TAG = re.compile(r"[\w.:+-]{1,40}")
MAX_TAGS = 20
"""A tag appears in ``eval.json``, which contains no text of a case, and must therefore be a short name."""
INVISIBLE = whitespace + "\u00a0\u200b\u200c\u200d\u2060\ufeff"
"""Blanks and zero-width characters, which are stripped from a patient's id."""


def read_jsonl(name: str) -> Iterator[CaseRow | RowNote]:
    """Yield the rows of a JSONL file: one object per line with ``id`` (text), ``text`` (the narrative), ``esi`` (1–5)
    and, optionally, ``tags`` (a list of short names, see `TAG`) and ``patient`` (text or integer). Other fields are
    ignored, and only ``text`` ever reaches a prompt. Empty lines are skipped.

    Raises:
        UserError: the file is damaged (see `numbered_lines`) or an id is repeated; gives file and line.
    """
    path = resolve_path(name)
    first_line: dict[str, int] = {}
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except BadRow as bad:
            yield RowNote(path, number, bad.reason, detail=bad.detail)
            continue
        case_id = record.case.id
        if case_id in first_line:
            raise UserError(f"{path}:{number}: id {case_id!r} was already used in line {first_line[case_id]}")
        first_line[case_id] = number
        yield record


def _record(line: str) -> CaseRow:
    try:
        row: Any = parse_json(line)
    except InvalidFile as error:
        raise BadRow("not_json", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"expected an object with id, text and esi, got a {type(row).__name__}")
    if missing := [key for key in ("id", "text", "esi") if key not in row]:
        raise BadRow("not_an_object", f"{' and '.join(missing)} missing: a case needs id, text and esi")
    case_id, text, esi, tags, patient = row["id"], row["text"], row["esi"], row.get("tags", []), row.get("patient", "")
    if not isinstance(case_id, str) or not 0 < len(case_id) <= 200 or not case_id.isprintable():
        raise BadRow("bad_field", "id must be printable text of 1 to 200 characters")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise BadRow("bad_field", f"text of case {case_id!r} must be a narrative of 1 to {MAX_TEXT:,} characters")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise BadRow("bad_field", f"text of case {case_id!r} contains a NUL or a lone surrogate: export the file again")
    if type(esi) is not int or not 1 <= esi <= 5:
        raise BadRow("bad_field", f"esi of case {case_id!r} must be an integer from 1 to 5, got {_short_repr(esi)}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags):
        raise BadRow(
            "bad_field",
            f"tags of case {case_id!r} must be a list of names of at most 40 letters, digits and _ . : + -, no blanks",
        )
    if len(tags) > MAX_TAGS:
        raise BadRow("bad_field", f"tags of case {case_id!r}: expected at most {MAX_TAGS}, got {len(tags)}")
    if type(patient) not in (str, int) or len(str(patient)) > 200:
        raise BadRow("bad_field", f"patient of case {case_id!r} must be a text of at most 200 characters or an integer")
    if not (patient := str(patient).strip(INVISIBLE)).isprintable():
        raise BadRow("bad_field", f"patient of case {case_id!r} contains an invisible character")
    return CaseRow(Case(case_id, text.strip(), esi, tuple(tags)), patient)


def _short_repr(value: object) -> str:
    """Return the repr of a short value; a long one may be a narrative in the wrong field."""
    return repr(value) if len(repr(value)) <= 12 else f"a {type(value).__name__}"
