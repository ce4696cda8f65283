"""Files that nobody vouches for → bytes, lines, JSON, TOML: in bounded memory, and never waiting for what is no file.

Everything here raises one error, `Unreadable`, whose message says why and where, and neither the file's name nor
anything that stands in it: callers name the file, and a case's text may be a patient's.
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
"""Of a file that is read whole, unless its reader says otherwise: a config, a reward set, a header."""
MOST_TOML = 512 * 1024
LONGEST_TOML_LINE = 1024
"""Characters of a line of TOML with more than `DEEPEST` dots: reading a dotted key takes time quadratic in
its parts."""
DEEPEST = 64
"""Lists and objects within each other. No file of ours goes beyond 10."""
LARGEST = 2**63
"""No whole number of a file of ours lies farther from 0."""
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Unreadable(ValueError):
    """A file that is not what it should be. Says why and where, never what stands in it."""


def is_regular(path: Path) -> bool:
    """Whether a file is there, links followed; False also for what cannot be looked at and for impossible names."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> BufferedReader:
    """The file, open for reading. A pipe, a device or a folder is refused at once: opening never waits.

    Raises:
        Unreadable: not there, not to be read, or no file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise Unreadable("cannot be read: no file can have this name") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise Unreadable(f"cannot be read: expected a file, found {KINDS.get(kind, 'something else')}")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """All of a file of at most ``most`` bytes. Raises `Unreadable`."""
    try:
        with open_regular(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise Unreadable(f"over {most:,} bytes: not a file of this kind")
    return content


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """A UTF-8 text of at most ``most`` bytes, a byte-order mark before it dropped. Raises `Unreadable`."""
    return decoded(read_bytes(path, most=most))


def decoded(content: bytes) -> str:
    r"""UTF-8 → text, a byte-order mark dropped.

    Raises:
        Unreadable: another encoding, or a NUL.

    >>> decoded(b"\xef\xbb\xbfESI 2\r\n")
    'ESI 2\r\n'
    """
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise Unreadable(f"not UTF-8 but {name}, by its byte-order mark: save it as UTF-8")
    if (place := content.find(b"\0")) >= 0:
        raise Unreadable(f"holds a NUL (byte {place}): not a text file, or a damaged one")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 (byte {error.start}): save it as UTF-8") from None


def raw_lines(path: Path, *, longest: int = MEBIBYTE) -> Iterator[bytes]:
    """The lines of a file with their ends, one in memory at a time.

    Raises:
        Unreadable: a line of more than ``longest`` bytes, named by its number.
    """
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(longest + 1):
                number += 1
                if len(line) > longest:
                    raise Unreadable(f"line {number}: over {longest:,} bytes: not a file of this kind")
                yield line
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None


def read_json(path: Path, *, most: int = MOST_BYTES, foreign: bool = False) -> Any:
    """The value in a JSON file. Raises `Unreadable`; see `parse_json`."""
    return parse_json(read_text(path, most=most), foreign=foreign)


def parse_json(text: str | bytes, *, foreign: bool = False) -> Any:
    """The value of a JSON text in which each key stands once.

    Args:
        foreign: of another program: take NaN and the infinities, which are no JSON, and whole numbers beyond
            ±`LARGEST`. Models' configs hold both.

    Raises:
        Unreadable: anything else, nesting beyond `DEEPEST`; unless ``foreign``, a number that is not finite or too
            large.

    >>> parse_json('{"step": 1}')
    {'step': 1}
    >>> parse_json('{"step": 1, "step": 2}')
    Traceback (most recent call last):
    rewards.safe_files.Unreadable: not valid JSON: a key stands twice in one object
    """
    text = decoded(text) if isinstance(text, bytes) else text
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
        raise Unreadable(f"not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise Unreadable("not valid JSON: nested too deep") from None
    except Unreadable:
        raise
    except ValueError:
        raise Unreadable("not valid JSON: a number of too many digits") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _refuse_depth(value, "JSON")
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text, in bounded time. Raises `Unreadable`.

    >>> parse_toml("steps = 3")
    {'steps': 3}
    """
    if len(text) > MOST_TOML:
        raise Unreadable(f"not valid TOML: over {MOST_TOML:,} characters: not a file of this kind")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST_TOML_LINE and line.count(".") > DEEPEST:
            raise Unreadable(f"not valid TOML: line {number} has over {LONGEST_TOML_LINE:,} characters: break it")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unreadable(f"not valid TOML: {error}") from None
    except RecursionError:
        raise Unreadable("not valid TOML: nested too deep") from None
    except ValueError:
        raise Unreadable("not valid TOML: a number of too many digits") from None
    _refuse_depth(table, "TOML")
    return table


def check_contents(folder: Path) -> None:
    """Makes sure that a folder holds files and folders alone, and nothing that leads out of it.

    Raises:
        Unreadable: a link out of the folder, or to nowhere, a pipe, a socket, a device; names it.
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
                            raise Unreadable(f"{inner}: a link out of this folder: put there what it points to")
                    elif entry.is_dir():
                        waiting.append(Path(entry.path))
                    elif not entry.is_file():
                        kind = KINDS.get(stat.S_IFMT(entry.stat().st_mode), "something else")
                        raise Unreadable(f"{inner}: expected files and folders alone, found {kind}")
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None


def clipped(value: object, most: int = 80) -> str:
    """A value for a message: as Python writes it, cut short.

    >>> clipped("a" * 100, 10)
    "'aaaaaaaa…"
    """
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # whole numbers of too many digits, nesting
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 1] + "…"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise Unreadable("not valid JSON: a key stands twice in one object")
    return table


def _small(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= (value := int(digits)) < LARGEST:
        raise Unreadable("not valid JSON: a whole number of more than 64 bits")
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise Unreadable("not valid JSON: a number too large to be one")
    return value


def _no_constant(name: str) -> Never:
    raise Unreadable(f"not valid JSON: {name} is no JSON number")


def _refuse_depth(value: Any, kind: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise Unreadable(f"not valid {kind}: nested too deep")
