"""Decide whether the text after a level gives a second one: "ESI 2 or 3" does, "ESI 2 or so" and "ESI 3, 2 resources"
do not.

A second level is a number *joined* to the first: only the words and signs of the tables below stand between the two.
Anything else ends the search ("ESI 2 because pain 9/10 and HR 110"). There are three ways to be joined:

- By a *range* (`RANGE_WORDS`, or a dash or slash without blanks): any number is a second level.
- *Loosely* (blanks, punctuation, brackets, arrows, `JOIN_WORDS`, `FILLER_WORDS`): a single digit is a second level
  unless it counts or measures something. It does if a word follows that is not in `HEDGES` ("(2 resources)",
  "3 h ago"), or if it is part of a larger figure ("9/10", "2+", "3-year-old", "5%", "2 or more"). A "1." or "(1)"
  before such a word begins a list of reasons.
- *Across a line break* only by a joining word or a sign of `JOIN_SIGNS` ("2\\nor 3").

A labeled level later in the line ("though level 3 fits", "maybe ESI 3") is also a second one, unless it is negated
("not ESI 1", "rather than ESI 3").
"""

import re

BLANK = r" \t\u00a0\u2007\u2009\u202f"
"""Character class: blanks that do not end a line."""
DASH = r"\-\u2010-\u2015\u2212"
"""Character class: hyphens, dashes and the minus sign."""
JOIN_SIGNS = r"/\\|&+~,;\u2026\u2190-\u21ff"
"""Character class: signs that join two numbers, including arrows."""

RANGE_WORDS = ("or", "to", "through", "thru", "versus", "vs")
JOIN_WORDS = (
    "and", "but", "maybe", "possibly", "perhaps", "probably", "potentially", "alternatively", "alternative",
    "otherwise", "else", "also", "plus", "then", "even", "though", "although", "however", "borderline", "bordering",
    "leaning", "almost", "nearly",
)  # fmt: skip
FILLER_WORDS = (
    "it", "this", "could", "might", "may", "can", "would", "should", "be", "is", "a", "an", "the", "as", "well", "at",
    "on", "with", "least", "most", "best", "worst", "either", "both", "up", "down", "toward", "towards", "possible",
    "esi", "level", "score", "triage", "acuity",
)  # fmt: skip
"""Words that may accompany joining words; alone they join loosely."""
HEDGES = (
    "is", "are", "was", "may", "might", "could", "would", "can", "should", "also", "too", "as", "or", "and", "but",
    "to", "if", "when", "unless", "because", "since", "given", "due", "based", "depending", "though", "although",
    "while", "both", "either", "perhaps", "maybe", "possible", "possibly", "plausible", "likely", "otherwise",
    "instead", "fits", "fit", "applies", "apply", "acceptable", "reasonable", "considered",
)  # fmt: skip
"""Words after a number that refer to a level, not to something counted."""


def _words(*tables: tuple[str, ...]) -> str:
    return rf"\b(?:{'|'.join(word for table in tables for word in table)})\b"


_WORD_VALUES = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_MARKUP = r"*_`\"'()\[\]{}<>#"
_JOINING = _words(RANGE_WORDS, JOIN_WORDS)
_HEDGE = _words(HEDGES)
_SOFT = rf"[{BLANK}{_MARKUP}{JOIN_SIGNS}{DASH}.:=?!]++"
JOINER = rf"(?:{_SOFT}|{_words(RANGE_WORDS, JOIN_WORDS, FILLER_WORDS)})++"
"""What may stand between two levels in one line. All repetitions are possessive: matching is linear."""
_BREAK = rf"[{BLANK}\r]*+\n\s*+"
_GAP = re.compile(
    rf"(?:{_SOFT}|{_JOINING}(?:{_BREAK})?+|{_words(FILLER_WORDS)}"
    rf"|{_BREAK}(?=[{BLANK}{_MARKUP}]*+(?:[{JOIN_SIGNS}]|{_JOINING})))++",
    re.IGNORECASE,
)
_RANGE_WORD = re.compile(_words(RANGE_WORDS), re.IGNORECASE)
_TIGHT = re.compile(rf"(?<![{BLANK}\n{DASH}/])[{DASH}/](?![{BLANK}\n{DASH}/])")
_NUMBER = re.compile(rf"\d{{1,9}}+|{_words(tuple(_WORD_VALUES))}", re.IGNORECASE)
_DIGIT = re.compile(rf"\d(?![\w%°+]|\.\d|[{BLANK}]?/[{BLANK}]?\d\d|[{DASH}]\w\w)")
_COUNTS = re.compile(
    rf"(?:[{DASH}/]\d)*+[{BLANK}*_]*+"
    rf"(?:=|(?:or|and)[{BLANK}]++(?:more|less|fewer|greater|above|up)\b|(?!{_HEDGE})[^\W\d_])",
    re.IGNORECASE,
)
"""What follows a digit that counts or measures: "-4 h", " resources", " or more", " = least urgent"."""
_LIST = re.compile(rf"1[.):][*_]*+[{BLANK}]++[*_]*+(?!{_HEDGE})[^\W\d_]", re.IGNORECASE)
_BEFORE_LIST = re.compile(rf"[\s{_MARKUP}{DASH}.:]*+")

ESI_LABEL = rf"ESI\b[{BLANK}{_MARKUP}]{{0,3}}+(?:(?:triage )?(?:level|score)\b)?(?:[{BLANK}:#=*_{DASH}]|\bis\b){{0,6}}+"
"""Labels a number as an ESI level: "ESI ", "ESI level: ", "ESI-"."""
_LABELED = re.compile(rf"\b(?:{ESI_LABEL}|level[{BLANK}])(?P<level>\d{{1,9}}+)\b(?! trauma)", re.IGNORECASE)
_NEGATED = re.compile(
    rf"(?:(?<!\bif )\bnot|\b(?:never|no|nor|neither|than|unlike|without|excluding|instead of|ruled out))(?: an?)?"
    rf"[{BLANK}{_MARKUP}]*+$",
    re.IGNORECASE,
)
_NEGATION_REACH = 24
"""Characters before a labeled level in which its negation is searched."""


def second_level(text: str, end: int, stop: int, digits: str) -> bool:
    """Return whether the text after a level gives another one, by the rules in the module docstring.

    Args:
        text: the whole text.
        end: end of the level.
        stop: end of the text to search.
        digits: the level's digits. An equal number is not another level ("ESI 2 (2)").

    >>> [second_level(text, 5, len(text), "2") for text in ("ESI 2 or 3", "ESI 2 (3)", "ESI 2. Alternatively 3.")]
    [True, True, True]
    >>> [second_level(text, 5, len(text), "2") for text in ("ESI 2 (3 resources)", "ESI 2, pain 9/10", "ESI 2, not 3")]
    [False, False, False]
    """
    return _joined(text, end, stop, int(digits)) or _labeled(text, end, stop, int(digits))


def _joined(text: str, end: int, stop: int, level: int) -> bool:
    while gap := _GAP.match(text, end, stop):
        number = _NUMBER.match(text, gap.end(), stop) if _is_range(gap.group()) else _loose(text, gap, stop)
        if number is None:
            return False
        if _value(number.group()) != level:
            return True
        end = number.end()
    return False


def _is_range(gap: str) -> bool:
    """Return whether the gap has a range word, or a dash or slash without blanks."""
    return bool(_RANGE_WORD.search(gap) or _TIGHT.search(gap))


def _loose(text: str, gap: re.Match[str], stop: int) -> re.Match[str] | None:
    """Return the digit after the gap, unless it counts, measures or begins a list."""
    digit = _DIGIT.match(text, gap.end(), stop)
    if digit is None or _COUNTS.match(text, digit.end(), stop):
        return None
    opens_list = _LIST.match(text, gap.end(), stop) and _BEFORE_LIST.fullmatch(gap.group())
    return None if opens_list else digit


def _value(number: str) -> int:
    return _WORD_VALUES.get(number.lower()) or int(number)


def _labeled(text: str, end: int, stop: int, level: int) -> bool:
    line_end = text.find("\n", end, stop)
    matches = _LABELED.finditer(text, end, stop if line_end < 0 else line_end)
    return any(int(match["level"]) != level and not _negated(text, end, match.start()) for match in matches)


def _negated(text: str, end: int, begin: int) -> bool:
    return bool(_NEGATED.search(text, max(end, begin - _NEGATION_REACH), begin))
