"""Text for a terminal: control characters are escaped, and every line fits.

Texts of models and cases can contain escape sequences, bidirectional overrides and letters two columns wide.
"""

import codecs
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

MIN_WIDTH = 60
"""Fewest columns that a table is laid out for."""
ASCII_FALLBACKS = {
    "–": "-", "—": "-", "‑": "-", "−": "-", "…": "...", "→": "->", "↦": "->", "×": "x", "·": ".", "±": "+-", "≥": ">=",
    "≤": "<=", "≠": "!=", "≈": "~", "Σ": "sum ", "β": "beta", "μ": "mu", "σ": "sigma", "γ": "gamma", "ε": "epsilon",
    "π": "pi", "ρ": "rho", "√": "sqrt", "∞": "inf", "²": "^2", "½": "1/2", "°": " deg ", "†": "+", "‡": "++", "─": "-",
    "’": "'", "“": '"', "”": '"',
}  # fmt: skip
"""Character in this program's messages → its replacement on a terminal whose encoding lacks it."""


def tolerate_narrow_encodings() -> None:
    """Let standard output and error replace characters that their encoding lacks, by `ASCII_FALLBACKS` or an escape,
    instead of raising `UnicodeEncodeError` in the middle of a message."""
    codecs.register_error("grpo.ascii", _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="grpo.ascii")


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    replaced = (ASCII_FALLBACKS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in text)
    return "".join(replaced), error.end


def print_unless_pipe_closed(text: str, stream: TextIO | None = None) -> None:
    """Print a text to standard output, or to ``stream``; from then on nothing if the reader has closed the pipe."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def escape_control(text: str) -> str:
    r"""Return the text with control and invisible characters as escapes.

    >>> escape_control("ESI\x1b[2J 2\n\u202e")
    'ESI\\x1b[2J 2\\n\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def display_width(text: str) -> int:
    """Return the columns that a text from `escape_control` occupies: two for a wide letter, none for a combining mark.

    >>> display_width("ESI 2"), display_width("日本"), display_width("é")
    (5, 4, 1)
    """
    return sum(_columns(c) for c in text)


def pad_or_truncate(text: str, width: int) -> str:
    """Return the text padded to a width, or truncated to it with an ellipsis.

    >>> pad_or_truncate("severe_pain_missed", 8), pad_or_truncate("ok", 4)
    ('severe_…', 'ok  ')
    """
    if display_width(text) > width:
        text = text[: _end(text, 0, width - 1)] + "…"
    return text + " " * (width - display_width(text))


def wrap(text: str, width: int) -> Iterator[str]:
    r"""Yield the lines of a text, each made `escape_control` and broken at spaces (or anywhere, if there are none) to
    fit a width. Line breaks of the text are kept; a carriage return is shown as an escape.

    >>> list(wrap("Chest pain,\nBP 120/58", 8))
    ['Chest', 'pain,', 'BP', '120/58']
    """
    for line in text.split("\n"):
        line, start = escape_control(line), 0
        while (end := _end(line, start, width)) < len(line):
            blank = line.rfind(" ", start + 1, end + 1)
            cut = blank if blank > 0 else end
            yield line[start:cut].rstrip(" ")
            start = cut
            while line.startswith(" ", start):
                start += 1
        yield line[start:]


def error_lines(error: Exception) -> str:
    """Return the message of an error with control characters escaped, and its notes on lines of their own."""
    lines = [*str(error).splitlines(), *(f"       {note}" for note in getattr(error, "__notes__", ()))]
    return "error: " + "\n".join(escape_control(line) for line in lines)


def screen_width(stream: TextIO) -> int:
    """Return the columns of the terminal behind a stream, at least `MIN_WIDTH`, or 80 without a terminal. The
    environment variable ``COLUMNS`` takes precedence, as for a pipe into a pager."""
    if (width := os.environ.get("COLUMNS", "")).isdecimal() and int(width):
        return max(MIN_WIDTH, int(width))
    try:
        return max(MIN_WIDTH, os.get_terminal_size(stream.fileno())[0] or 80) if stream.isatty() else 80
    except (OSError, ValueError):  # a stream without a file, or a terminal without a size
        return 80


def _end(line: str, start: int, width: int) -> int:
    """Return where the longest part of a line that begins at ``start`` and fits ends; at least one character."""
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
