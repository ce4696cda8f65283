"""Safetensors files that nobody vouches for: their header is held against the file before a tensor is read.

The library refuses offsets that overlap, leave holes or leave the file. Here is refused what it lets pass or waits for:
a pipe, a name that stands twice (the last would win), shapes of a thousand sides.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rewards.safe_files import MEBIBYTE, Unreadable, open_regular, parse_json

MOST_HEADER = 32 * MEBIBYTE
"""Bytes; a header takes about 100 a tensor."""
MOST_SIDES = 8


@dataclass(frozen=True, slots=True)
class Declared:
    """What a header says of one tensor."""

    dtype: str
    """In the format's own words: "F32", "BF16"."""
    shape: tuple[int, ...]


def declared(path: Path) -> dict[str, Declared]:
    """Name → dtype and shape, in the file's order; nothing but the header is read.

    Raises:
        Unreadable: no safetensors file, or one whose header cannot be true.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise Unreadable(f"cannot be read: no safetensors file: {size:,} bytes, its header {length:,}")
        try:
            header = parse_json(file.read(length))
        except Unreadable as error:
            raise Unreadable(f"cannot be read: its safetensors header is {error}") from None
    if not isinstance(header, dict):
        raise Unreadable("cannot be read: no safetensors file: its header is no JSON object")
    return {name: _declared(told) for name, told in header.items() if name != "__metadata__"}


def _declared(told: Any) -> Declared:
    dtype, shape = (told.get("dtype"), told.get("shape")) if isinstance(told, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > MOST_SIDES:
        raise Unreadable("cannot be read: its safetensors header gives a tensor no dtype or no shape")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise Unreadable("cannot be read: its safetensors header gives a tensor a shape that is none")
    return Declared(dtype, tuple(shape))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The library's open file, its tensors not yet read, as torch's.

    Raises:
        Unreadable: as `declared`; and for whatever the library refuses, also inside.
    """
    declared(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise Unreadable(f"cannot be read: {error}") from None
