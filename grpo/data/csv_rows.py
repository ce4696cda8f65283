"""Files → decoded lines and CSV rows, plain or gzip, in memory that does not grow with the file.

What is wrong with a file as a file (encoding, NUL, a torn gzip, quotes that never close) raises `UserError` with file
and line: a file damaged in one place cannot be trusted in the next. What is wrong with one row is the loader's to say.
"""

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Never, Protocol

from grpo.runtime.errors import UserError
from rewards.safe_files import Unreadable, open_regular

MAX_LINE = 4 * 2**20
"""Bytes. More in one line is a file without line ends, or not a text file."""
GZIP = b"\x1f\x8b"
EXPANDS_UP_TO = 100
"""Times its size, once more than `MAX_EXPANDED` bytes have come out of a gzip. A table expands 3 to 20 times."""
MAX_EXPANDED = 4 * 2**20
SHOWN_CELLS = 40
"""Of a header, in a message."""
UTF8_MARK = "\ufeff"
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MISREAD_AS = ("gbk", "cp1252")
"""Encodings in which published files had their byte-order mark read and saved again."""


class _Reader(Protocol):
    """What `csv.reader` returns; the library has no public name for it."""

    line_num: int

    def __next__(self) -> list[str]: ...

    def __iter__(self) -> Iterator[list[str]]: ...


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end) of a UTF-8 file; gzip is told by its first bytes, not by the name.

    A UTF-8 byte-order mark is no part of the first line.

    Raises:
        UserError: no file, not UTF-8, a NUL, a line over `MAX_LINE` bytes, a gzip that is torn, damaged or expands
            beyond what a table can.
    """
    number = 0
    try:
        with open_regular(path) as raw:
            size = os.fstat(raw.fileno()).st_size
            head = raw.read(2)
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if head == GZIP else raw
            most = max(MAX_EXPANDED, EXPANDS_UP_TO * size)
            while line := file.readline(MAX_LINE + 1):
                number += 1
                most -= len(line)
                if most < 0:
                    raise UserError(
                        f"{path}:{number}: expands over {EXPANDS_UP_TO} times: no table; unpack it if it is one"
                    )
                yield number, _decoded(path, number, line)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}:{number + 1}: gzip torn or damaged here: download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def table(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(line, row) for each row of a CSV file with a header; a row is a dict of the columns asked for **and no others**,
    or None if it has more or fewer fields than the header. Empty lines are no rows.

    Columns are found by name, wherever they stand: blanks around a name, upper case and blanks for ``_`` make no
    difference, and a byte-order mark before the first is undone even if it was read in another encoding and saved.

    Args:
        path: plain or gzip.
        required: names that must be there.
        optional: names that may be; where one is missing, the rows lack the key.
        aliases: another name → the name it stands for.

    Raises:
        UserError: as `numbered_lines`; a missing or repeated column; quotes that are not CSV's, a field over 131,072
            characters (Python's limit).
    """
    reader = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    line, header = _next(path, reader)
    if header is None:
        raise UserError(f"{path}:1: empty: expected a header with {', '.join(required)}")
    places = _places(path, header, required, optional, aliases or {})
    width = len(header)
    while True:
        line, cells = _next(path, reader)
        if cells is None:
            return
        if len(cells) == width:
            yield line, {name: cells[place] for name, place in places}
        elif cells:
            yield line, None


def plain_name(cell: str) -> str:
    """A column's name without what makes no difference.

    >>> plain_name("锘縮ubject_id"), plain_name("ï»¿subject_id"), plain_name(" Final  Decision")
    ('subject_id', 'subject_id', 'final_decision')
    """
    return re.sub(r"[\s_]+", "_", _unmarked(cell).strip().casefold())


def _unmarked(cell: str) -> str:
    mark = UTF8_MARK.encode()
    for encoding in MISREAD_AS:
        try:
            as_written = cell.encode(encoding)
            if as_written.startswith(mark):
                return as_written[len(mark) :].decode()
        except UnicodeError:
            continue
    return cell.removeprefix(UTF8_MARK)


def _decoded(path: Path, number: int, line: bytes) -> str:
    if number == 1 and (other := OTHER_MARKS.get(line[:2])):
        raise UserError(f"{path}:1: {other}, by its byte-order mark: save it as UTF-8")
    if len(line) > MAX_LINE:
        raise UserError(f"{path}:{number}: over {MAX_LINE:,} bytes without a line end: not a case file")
    if b"\0" in line:
        raise UserError(f"{path}:{number}: holds a NUL byte: not a text file, or a damaged one; export it again")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line): save it as UTF-8") from None


def _next(path: Path, reader: "_Reader") -> tuple[int, list[str] | None]:
    """The next row and the line where it begins, or None at the end."""
    line = reader.line_num + 1
    try:
        return line, next(reader, None)
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV from this row on: {error}") from None


def _places(
    path: Path, header: list[str], required: Sequence[str], optional: Sequence[str], aliases: Mapping[str, str]
) -> list[tuple[str, int]]:
    names = [plain_name(cell) for cell in header]
    names = [aliases.get(name, name) for name in names]
    if missing := [name for name in required if name not in names]:
        _refuse_header(path, missing, [name for name in required if name in names], header)
    wanted = (*required, *optional)
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise UserError(f"{path}:1: column {' and '.join(twice)} stands there more than once: keep one")
    return [(name, names.index(name)) for name in wanted if name in names]


def _refuse_header(path: Path, missing: list[str], there: list[str], header: list[str]) -> Never:
    """A header with none of the names may be a row, and a row may be a patient's: then it is not shown."""
    shown = [f"{cell.strip():.40}" for cell in header[:SHOWN_CELLS]] + ["…"] * (len(header) > SHOWN_CELLS)
    found = (
        f"found {', '.join(shown)}"
        if there
        else f"none of the {len(header)} fields of line 1 is a known name: is the header missing?"
    )
    plural = "s" if len(missing) > 1 else ""
    raise UserError(f"{path}:1: column{plural} {', '.join(missing)} missing; {found}")
