"""Text for a terminal: control characters are escaped, and every line fits.

Texts of models and cases can contain escape sequences, bidirectional overrides and letters two columns wide.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

MIN_WIDTH = 60
"""Fewest columns that a table is laid out for."""


def tolerate_narrow_encodings() -> None:
    """Let standard output and error escape characters that their encoding lacks, instead of raising
    `UnicodeEncodeError` in the middle of a message."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


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
    r"""Yield the lines of a text with control characters escaped, broken at spaces (or anywhere, if there are none) to
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


def screen_width() -> int:
    """Return the columns of the terminal on standard output, at least `MIN_WIDTH`, or 80 without a terminal. The
    environment variable ``COLUMNS`` takes precedence, as for a pipe into a pager."""
    return max(MIN_WIDTH, shutil.get_terminal_size().columns)


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
