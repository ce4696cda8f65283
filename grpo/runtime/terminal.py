"""Text for a terminal: nothing in it is obeyed, and every line fits.

Texts of models and cases can hold escape sequences, bidirectional overrides and letters two columns wide.
"""

import codecs
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

NARROWEST = 60
"""Columns that a table is laid out for at the least."""
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
"""Style → its SGR code."""
STYLED = re.compile(r"\x1b\[\d*m")
"""What `painted` adds."""


SPELT = {
    "–": "-", "—": "-", "‑": "-", "−": "-", "…": "...", "→": "->", "↦": "->", "×": "x", "·": ".", "±": "+-", "≥": ">=",
    "≤": "<=", "≠": "!=", "≈": "~", "Σ": "sum ", "β": "beta", "μ": "mu", "σ": "sigma", "γ": "gamma", "ε": "epsilon",
    "π": "pi", "ρ": "rho", "√": "sqrt", "∞": "inf", "²": "^2", "½": "1/2", "°": " deg ", "†": "+", "‡": "++", "─": "-",
    "’": "'", "“": '"', "”": '"',
}  # fmt: skip
"""What this program's own texts use → how a terminal without it shows it."""


def say_anyhow() -> None:
    """Makes standard output and error show what their encoding lacks as in `SPELT`, else as an escape: no command ends
    in a `UnicodeEncodeError` halfway through what it has to say."""
    codecs.register_error("grpo.spelt", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="grpo.spelt")


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELT.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in text), error.end


def tell(text: str) -> None:
    """Prints a text, if anybody still reads it: `| head` closes the pipe, and a run is not to end by that."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def visible(text: str) -> str:
    r"""The text with everything that a terminal would obey, or not show, as an escape.

    >>> visible("ESI\x1b[2J 2\n\u202e")
    'ESI\\x1b[2J 2\\n\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def columns(text: str) -> int:
    """How many columns a text takes that `visible` has passed: two for wide letters, none for combining marks.

    >>> columns("ESI 2"), columns("日本"), columns("é")
    (5, 4, 1)
    """
    return sum(_columns(c) for c in text)


def fit(text: str, width: int) -> str:
    """The text cut to a width, with an ellipsis where something is missing, and padded to it.

    >>> fit("severe_pain_missed", 8), fit("ok", 4)
    ('severe_…', 'ok  ')
    """
    if columns(text) > width:
        kept, used = "", 0
        for c in text:
            if used + _columns(c) > width - 1:
                break
            kept, used = kept + c, used + _columns(c)
        text = kept + "…"
    return text + " " * (width - columns(text))


def wrap(text: str, width: int) -> Iterator[str]:
    r"""The lines of a text, each made `visible` and broken at blanks (or anywhere, if there are none) to fit a width.

    Its own line breaks stay; a carriage return is shown.

    >>> list(wrap("Chest pain,\nBP 120/58", 8))
    ['Chest', 'pain,', 'BP', '120/58']
    """
    for line in text.split("\n"):
        line, start = visible(line), 0
        while (end := _end(line, start, width)) < len(line):
            blank = line.rfind(" ", start + 1, end + 1)
            cut = blank if blank > 0 else end
            yield line[start:cut].rstrip(" ")
            start = cut
            while line.startswith(" ", start):
                start += 1
        yield line[start:]


def error_lines(error: Exception) -> str:
    """An error for a person: what it quotes is not obeyed."""
    return "error: " + "\n".join(visible(line) for line in str(error).splitlines())


def screen_width(stream: TextIO) -> int:
    """Columns of the terminal behind a stream, at least `NARROWEST`; 80 for anything that is no terminal. ``COLUMNS``
    in the environment has the last word, as for a pipe into a pager."""
    if (asked := os.environ.get("COLUMNS", "")).isdecimal() and int(asked):
        return max(NARROWEST, int(asked))
    try:
        return max(NARROWEST, os.get_terminal_size(stream.fileno()).columns or 80) if stream.isatty() else 80
    except (OSError, ValueError):  # a stream without a file, or a terminal that knows no size
        return 80


def wants_colour(stream: TextIO) -> bool:
    """A terminal that has not been asked for plain text (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, style: str, *, colour: bool) -> str:
    """The text in one of `STYLES`; as it is without colour or style.

    >>> painted("clipped", "red", colour=False)
    'clipped'
    """
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if colour and style and text else text


def _end(line: str, start: int, width: int) -> int:
    """Where the part of a line that begins at ``start`` and fits ends: at least one character, if there is one."""
    used = 0
    for i in range(start, len(line)):
        used += _columns(line[i])
        if used > width:
            return max(start + 1, i)
    return len(line)


def _columns(c: str) -> int:
    if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1
