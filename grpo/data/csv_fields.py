"""What the fields of a published table can hold, and what that means; shared by every CSV format."""

import re

from grpo.data.row_report import BadRow

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "nil", "\\n", "<na>"})
"""Spellings of "no value" that exports of a table leave behind, casefolded."""
ID = re.compile(r"\d{1,18}", re.ASCII)
LEVEL = re.compile(r"([1-5])(?:\.0+)?", re.ASCII)


def missing(value: str) -> bool:
    """True for an empty field and for the spellings of one.

    >>> missing(" "), missing("NaN"), missing("0")
    (True, True, False)
    """
    return value.strip().casefold() in MISSING


def identifier(value: str) -> int:
    """A subject_id or stay_id; `BadRow` for anything but 1 to 18 digits.

    >>> identifier(" 10000032 ")
    10000032
    """
    if not ID.fullmatch(value := value.strip()):
        raise BadRow("bad_id")
    return int(value)


def acuity(value: str) -> int:
    """A gold level; `BadRow` for none, and for what is no level from 1 to 5.

    >>> acuity("2"), acuity("2.0")
    (2, 2)
    """
    if missing(value):
        raise BadRow("no_acuity")
    if not (found := LEVEL.fullmatch(value.strip())):
        raise BadRow("bad_acuity")
    return int(found[1])
