"""Read untrusted files as bytes, lines, JSON or TOML, in bounded memory and without ever blocking.

Every function raises one error, `InvalidFile`. Its message gives the reason and the position but neither the file name,
which callers add, nor any content, which may be patient data.
"""

import codecs
import json
import math
import os
import stat
import tomllib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Never

MEBIBYTE = 2**20
MOST_BYTES = 8 * MEBIBYTE
"""Default limit for a file that is read as a whole: a config, a reward set, a header."""
MOST_TOML = 512 * 1024
"""Characters."""
LONGEST_TOML_LINE = 1024
"""Characters of a TOML line with more than `DEEPEST` dots: parsing a dotted key is quadratic in its parts."""
DEEPEST = 64
"""Nesting of lists and objects. This project's own files need at most 10."""
LARGEST = 2**63
"""Largest absolute value of an integer in this project's own files."""
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class InvalidFile(ValueError):
    """An invalid file. The message gives the reason and the position, never the content."""


def is_regular(path: Path) -> bool:
    """Return whether the path is a regular file, following links; False if it cannot be inspected."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Opening never blocks: pipes, devices and folders are refused.

    Raises:
        InvalidFile: the file is missing, not readable, or not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidFile(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise InvalidFile("cannot be read: no file can have this name") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise InvalidFile(f"cannot be read: expected a file, found {KINDS.get(kind, 'something else')}")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file of at most ``most`` bytes. Raises `InvalidFile`."""
    try:
        with open_regular(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InvalidFile(f"cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise InvalidFile(f"over {most:,} bytes: not a file of this kind")
    return content


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """Return a UTF-8 text of at most ``most`` bytes without its byte-order mark. Raises `InvalidFile`."""
    return decode_utf8(read_bytes(path, most=most))


def decode_utf8(content: bytes) -> str:
    r"""Decode UTF-8, dropping a byte-order mark.

    Raises:
        InvalidFile: another encoding, or a NUL byte.

    >>> decode_utf8(b"\xef\xbb\xbfESI 2\r\n")
    'ESI 2\r\n'
    """
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise InvalidFile(f"not UTF-8 but {name}, by its byte-order mark: save it as UTF-8")
    if (place := content.find(b"\0")) >= 0:
        raise InvalidFile(f"contains a NUL (byte {place}): not a text file, or damaged")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"not UTF-8 (byte {error.start}): save it as UTF-8") from None


def iter_lines(path: Path, *, longest: int = MEBIBYTE) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, one at a time.

    Raises:
        InvalidFile: a line has more than ``longest`` bytes; gives its number.
    """
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(longest + 1):
                number += 1
                if len(line) > longest:
                    raise InvalidFile(f"line {number}: over {longest:,} bytes: not a file of this kind")
                yield line
    except OSError as error:
        raise InvalidFile(f"cannot be read: {error.strerror}") from None


def read_json(path: Path, *, most: int = MOST_BYTES, foreign: bool = False) -> Any:
    """Return the value in a JSON file. Raises `InvalidFile`; see `parse_json`."""
    return parse_json(read_text(path, most=most), foreign=foreign)


def parse_json(text: str | bytes, *, foreign: bool = False) -> Any:
    """Parse JSON in which no object repeats a key.

    Args:
        foreign: accept NaN, infinities and integers beyond ±`LARGEST`, which other programs write, for example into
            model configs.

    Raises:
        InvalidFile: invalid JSON, a repeated key, nesting beyond `DEEPEST`; unless ``foreign``, a number that is not
            finite or too large.

    >>> parse_json('{"step": 1}')
    {'step': 1}
    >>> parse_json('{"step": 1, "step": 2}')
    Traceback (most recent call last):
    rewards.safe_files.InvalidFile: not valid JSON: an object contains a key twice
    """
    text = decode_utf8(text) if isinstance(text, bytes) else text
    try:
        value = json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_int=int if foreign else _small,
            parse_float=float if foreign else _finite,
            parse_constant=float if foreign else _no_constant,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InvalidFile(f"not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise InvalidFile("not valid JSON: nested too deep") from None
    except InvalidFile:
        raise
    except ValueError:
        raise InvalidFile("not valid JSON: a number of too many digits") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _refuse_depth(value, "JSON")
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML in bounded time. Raises `InvalidFile`.

    >>> parse_toml("steps = 3")
    {'steps': 3}
    """
    if len(text) > MOST_TOML:
        raise InvalidFile(f"not valid TOML: over {MOST_TOML:,} characters: not a file of this kind")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST_TOML_LINE and line.count(".") > DEEPEST:
            raise InvalidFile(f"not valid TOML: line {number} has over {LONGEST_TOML_LINE:,} characters: break it")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidFile(f"not valid TOML: {error}") from None
    except RecursionError:
        raise InvalidFile("not valid TOML: nested too deep") from None
    except ValueError:
        raise InvalidFile("not valid TOML: a number of too many digits") from None
    _refuse_depth(table, "TOML")
    return table


def check_no_links_out(folder: Path) -> None:
    """Check that a folder contains only files and folders, and no links out of it.

    Raises:
        InvalidFile: a link out of the folder or to nowhere, a pipe, a socket or a device; gives its path.
    """
    root = os.path.realpath(folder)
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    inner = os.path.relpath(entry.path, folder)
                    if entry.is_symlink():
                        target = os.path.realpath(entry.path)
                        if os.path.commonpath([root, target]) != root or not os.path.exists(target):
                            raise InvalidFile(f"{inner}: a link out of this folder: replace it with its target")
                    elif entry.is_dir():
                        waiting.append(Path(entry.path))
                    elif not entry.is_file():
                        kind = KINDS.get(stat.S_IFMT(entry.stat().st_mode), "something else")
                        raise InvalidFile(f"{inner}: expected only files and folders, found {kind}")
        except OSError as error:
            raise InvalidFile(f"cannot be read: {error.strerror}") from None


def shorten(value: object, most: int = 80) -> str:
    """Return the repr of a value, shortened for a message.

    >>> shorten("a" * 100, 10)
    "'aaaaaaaa…"
    """
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # an integer with too many digits, or nesting too deep
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 1] + "…"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise InvalidFile("not valid JSON: an object contains a key twice")
    return table


def _small(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= (value := int(digits)) < LARGEST:
        raise InvalidFile("not valid JSON: a whole number of more than 64 bits")
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise InvalidFile("not valid JSON: a number too large for a float")
    return value


def _no_constant(name: str) -> Never:
    raise InvalidFile(f"not valid JSON: {name} is not a JSON number")


def _refuse_depth(value: Any, kind: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for node in level
            if isinstance(node, dict | list)
            for inner in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise InvalidFile(f"not valid {kind}: nested too deep")
