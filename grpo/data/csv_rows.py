"""Read lines, CSV rows and their fields from a file, plain or gzip, in constant memory.

A damaged file (encoding, NUL, truncated gzip, unclosed quotes) raises `UserError` with file and line and is not read
any further. Problems with single rows are reported by the loaders.
"""

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Never, Protocol

from grpo.data.row_report import BadRow
from grpo.runtime.errors import UserError
from rewards.safe_files import InvalidFile, open_regular

MAX_LINE = 4 * 2**20
"""Bytes. A longer line means that the file has no line ends or is not text."""
GZIP = b"\x1f\x8b"
MAX_GZIP_RATIO = 100
"""Largest ratio of a gzip, once it has expanded to `MAX_EXPANDED` bytes. Tables have a ratio of 3 to 20."""
MAX_EXPANDED = 4 * 2**20
MAX_CELLS_SHOWN = 40
"""Cells of a header that are quoted in a message."""
UTF8_MARK = "\ufeff"
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BOM_MISREADINGS = ("gbk", "cp1252")
"""Encodings in which a byte-order mark was misread and saved again."""
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "nil", "\\n", "<na>"})
"""Spellings of "no value" in exported tables, casefolded."""
ID = re.compile(r"\d{1,18}", re.ASCII)
LEVEL = re.compile(r"([1-5])(?:\.0+)?", re.ASCII)


class _Reader(Protocol):
    """The type that `csv.reader` returns."""

    line_num: int

    def __next__(self) -> list[str]: ...

    def __iter__(self) -> Iterator[list[str]]: ...


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its line end) of a UTF-8 file without its byte-order mark. Gzip is
    recognized by its first bytes, not by the file name.

    Raises:
        UserError: no such file, not UTF-8, a NUL, a line over `MAX_LINE` bytes, or a gzip that is truncated, damaged or
            expands too much.
    """
    number = 0
    try:
        with open_regular(path) as raw:
            size = os.fstat(raw.fileno()).st_size
            head = raw.read(2)
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if head == GZIP else raw
            most = max(MAX_EXPANDED, MAX_GZIP_RATIO * size)
            while line := file.readline(MAX_LINE + 1):
                number += 1
                most -= len(line)
                if most < 0:
                    raise UserError(
                        f"{path}:{number}: expands over {MAX_GZIP_RATIO} times: if it is a table, unpack it first"
                    )
                yield number, _decoded(path, number, line)
    except InvalidFile as error:
        raise UserError(f"{path}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}:{number + 1}: gzip truncated or damaged here: download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def table(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield (line, row) for each row of a CSV file with a header. A row is a dict of the requested columns **and no
    others**, or None if it has more or fewer fields than the header. Empty lines are skipped.

    Columns are found by name: surrounding blanks, letter case and blanks instead of ``_`` are ignored, and a byte-order
    mark is removed even if it was misread in another encoding.

    Args:
        path: plain or gzip.
        required: columns that must exist.
        optional: columns that may be missing; the rows then lack the key.
        aliases: alternative name → name.

    Raises:
        UserError: as `numbered_lines`; a missing or repeated column; invalid quotes; a field over 131,072 characters
            (Python's limit).
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


def plain_name(cell: str) -> str:
    """Normalize a column name.

    >>> plain_name("锘縮ubject_id"), plain_name("ï»¿subject_id"), plain_name(" Final  Decision")
    ('subject_id', 'subject_id', 'final_decision')
    """
    return re.sub(r"[\s_]+", "_", _unmarked(cell).strip().casefold())


def _unmarked(cell: str) -> str:
    mark = UTF8_MARK.encode()
    for encoding in BOM_MISREADINGS:
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
        raise UserError(f"{path}:{number}: contains a NUL byte: not a text file, or damaged; export it again")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line): save it as UTF-8") from None


def _next(path: Path, reader: "_Reader") -> tuple[int, list[str] | None]:
    """Return the next row and the line in which it begins, or None at the end."""
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
        raise UserError(f"{path}:1: column {' and '.join(twice)} occurs more than once: keep one")
    return [(name, names.index(name)) for name in wanted if name in names]


def _refuse_header(path: Path, missing: list[str], present: list[str], header: list[str]) -> Never:
    """Refuse a header. If it has none of the names it may be a row with patient data and is not quoted."""
    cells = [f"{cell.strip():.40}" for cell in header[:MAX_CELLS_SHOWN]] + ["…"] * (len(header) > MAX_CELLS_SHOWN)
    hint = (
        f"found {', '.join(cells)}"
        if present
        else f"none of the {len(header)} fields of line 1 is a known name: is the header missing?"
    )
    plural = "s" if len(missing) > 1 else ""
    raise UserError(f"{path}:1: column{plural} {', '.join(missing)} missing; {hint}")
