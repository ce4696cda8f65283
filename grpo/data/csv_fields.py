"""Parse the fields of published tables; shared by every CSV format."""

import re

from grpo.data.row_report import BadRow

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "nil", "\\n", "<na>"})
"""Spellings of "no value" in exported tables, casefolded."""
ID = re.compile(r"\d{1,18}", re.ASCII)
LEVEL = re.compile(r"([1-5])(?:\.0+)?", re.ASCII)


def missing(value: str) -> bool:
    """Return whether a field is empty or one of `MISSING`.

    >>> missing(" "), missing("NaN"), missing("0")
    (True, True, False)
    """
    return value.strip().casefold() in MISSING


def identifier(value: str) -> int:
    """Return a subject_id or stay_id; raise `BadRow` for anything but 1 to 18 digits.

    >>> identifier(" 10000032 ")
    10000032
    """
    if not ID.fullmatch(value := value.strip()):
        raise BadRow("bad_id")
    return int(value)


def acuity(value: str) -> int:
    """Return a gold level; raise `BadRow` if it is missing or not from 1 to 5.

    >>> acuity("2"), acuity("2.0")
    (2, 2)
    """
    if missing(value):
        raise BadRow("no_acuity")
    if not (match := LEVEL.fullmatch(value.strip())):
        raise BadRow("bad_acuity")
    return int(match[1])
