"""Does what follows a level name a second one? "ESI 2 or 3" names two levels, "ESI 2 or so" and "ESI 3, 2 resources"
name one.

A second level is a number *joined* to the first: between the two stands nothing but the words and signs of the tables
below. As soon as anything else is read, the text has gone on to something else ("ESI 2 because pain 9/10 and HR 110").
How it is joined decides how much is asked of it:

- By a *range* (`RANGE_WORDS`, or a dash or slash without blanks): any number is a second level.
- *Loosely* (blanks, punctuation, brackets, arrows, `LOOSE_WORDS`, `FILLERS`): a single digit is a second level unless
  it counts or measures something. It does if a word follows that is not in `HEDGES` ("(2 resources)", "3 h ago"), or
  if it is part of a larger figure ("9/10", "2+", "3-year-old", "5%", "2 or more"). A "1." or "(1)" before such a word
  opens a list of reasons.
- *Across a line break* only a word that joins or a sign of `SIGNS` carries on ("2\\nor 3"): the next line is otherwise
  its own.

Besides, a level called by its name later in the line ("though level 3 fits", "maybe ESI 3") is a second one, unless it
is denied ("not ESI 1", "rather than ESI 3").
"""

import re

BLANK = r" \t\u00a0\u2007\u2009\u202f"
"""For a character class: blanks that do not end a line, as models write them."""
DASH = r"\-\u2010-\u2015\u2212"
"""For a character class: hyphens, dashes and the minus sign."""
SIGNS = r"/\\|&+~,;\u2026\u2190-\u21ff"
"""For a character class: signs that join two numbers, arrows among them."""

RANGE_WORDS = ("or", "to", "through", "thru", "versus", "vs")
LOOSE_WORDS = (
    "and", "but", "maybe", "possibly", "perhaps", "probably", "potentially", "alternatively", "alternative",
    "otherwise", "else", "also", "plus", "then", "even", "though", "although", "however", "borderline", "bordering",
    "leaning", "almost", "nearly",
)  # fmt: skip
FILLERS = (
    "it", "this", "could", "might", "may", "can", "would", "should", "be", "is", "a", "an", "the", "as", "well", "at",
    "on", "with", "least", "most", "best", "worst", "either", "both", "up", "down", "toward", "towards", "possible",
    "esi", "level", "score", "triage", "acuity",
)  # fmt: skip
"""Words that may stand beside those that join, and join loosely by themselves."""
HEDGES = (
    "is", "are", "was", "may", "might", "could", "would", "can", "should", "also", "too", "as", "or", "and", "but",
    "to", "if", "when", "unless", "because", "since", "given", "due", "based", "depending", "though", "although",
    "while", "both", "either", "perhaps", "maybe", "possible", "possibly", "plausible", "likely", "otherwise",
    "instead", "fits", "fit", "applies", "apply", "acceptable", "reasonable", "considered",
)  # fmt: skip
"""Words after a number that speak of a level, and not of things counted."""


def _words(*tables: tuple[str, ...]) -> str:
    return rf"\b(?:{'|'.join(word for table in tables for word in table)})\b"


_WORD_VALUES = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_MARKUP = r"*_`\"'()\[\]{}<>#"
_JOINING = _words(RANGE_WORDS, LOOSE_WORDS)
_HEDGE = _words(HEDGES)
_SOFT = rf"[{BLANK}{_MARKUP}{SIGNS}{DASH}.:=?!]++"
JOINT = rf"(?:{_SOFT}|{_words(RANGE_WORDS, LOOSE_WORDS, FILLERS)})++"
"""All that may stand between two levels in one line. Possessive, like every repetition here: reading is linear."""
_BREAK = rf"[{BLANK}\r]*+\n\s*+"
_GAP = re.compile(
    rf"(?:{_SOFT}|{_JOINING}(?:{_BREAK})?+|{_words(FILLERS)}"
    rf"|{_BREAK}(?=[{BLANK}{_MARKUP}]*+(?:[{SIGNS}]|{_JOINING})))++",
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

NAME = rf"ESI\b[{BLANK}{_MARKUP}]{{0,3}}+(?:(?:triage )?(?:level|score)\b)?(?:[{BLANK}:#=*_{DASH}]|\bis\b){{0,6}}+"
"""What calls a number an ESI level: "ESI ", "ESI level: ", "ESI-"."""
_NAMED = re.compile(rf"\b(?:{NAME}|level[{BLANK}])(?P<level>\d{{1,9}}+)\b(?! trauma)", re.IGNORECASE)
_DENIED = re.compile(
    rf"(?:(?<!\bif )\bnot|\b(?:never|no|nor|neither|than|unlike|without|excluding|instead of|ruled out))(?: an?)?"
    rf"[{BLANK}{_MARKUP}]*+$",
    re.IGNORECASE,
)
_DENIAL_REACH = 24
"""Characters before a named level in which its denial is looked for."""


def second_level(text: str, end: int, stop: int, written: str) -> bool:
    """Whether the text after a level names another one, by the rule above.

    Args:
        text: the whole text.
        end: where the level stops.
        stop: where reading stops, at the latest.
        written: the level's digits. A number equal to it is no other level ("ESI 2 (2)").

    >>> [second_level(text, 5, len(text), "2") for text in ("ESI 2 or 3", "ESI 2 (3)", "ESI 2. Alternatively 3.")]
    [True, True, True]
    >>> [second_level(text, 5, len(text), "2") for text in ("ESI 2 (3 resources)", "ESI 2, pain 9/10", "ESI 2, not 3")]
    [False, False, False]
    """
    return _joined(text, end, stop, int(written)) or _named(text, end, stop, int(written))


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
    """A word of a range, or a dash or slash without blanks: with blanks it is a pause."""
    return bool(_RANGE_WORD.search(gap) or _TIGHT.search(gap))


def _loose(text: str, gap: re.Match[str], stop: int) -> re.Match[str] | None:
    """The digit after the gap, unless it counts, measures or opens a list."""
    digit = _DIGIT.match(text, gap.end(), stop)
    if digit is None or _COUNTS.match(text, digit.end(), stop):
        return None
    opens_list = _LIST.match(text, gap.end(), stop) and _BEFORE_LIST.fullmatch(gap.group())
    return None if opens_list else digit


def _value(number: str) -> int:
    return _WORD_VALUES.get(number.lower()) or int(number)


def _named(text: str, end: int, stop: int, level: int) -> bool:
    line_end = text.find("\n", end, stop)
    named = _NAMED.finditer(text, end, stop if line_end < 0 else line_end)
    return any(int(one["level"]) != level and not _denied(text, end, one.start()) for one in named)


def _denied(text: str, end: int, begin: int) -> bool:
    return bool(_DENIED.search(text, max(end, begin - _DENIAL_REACH), begin))
