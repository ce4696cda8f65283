"""Read safetensors files from untrusted sources: the header is checked before a tensor is read.

The library itself rejects offsets that overlap, leave gaps, or exceed the file. This module also rejects what the
library accepts or waits for: pipes, duplicate names (the last would win), and shapes of a thousand dimensions.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rewards.safe_files import MEBIBYTE, InvalidFile, open_regular, parse_json

MAX_HEADER_BYTES = 32 * MEBIBYTE
"""A header takes about 100 bytes per tensor."""
MAX_DIMS = 8


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Dtype and shape of a tensor in a file."""

    dtype: str
    """As the format writes it: "F32", "BF16"."""
    shape: tuple[int, ...]


def read_tensor_header(path: Path) -> dict[str, TensorHeader]:
    """Return name → header, in the file's order, without reading any tensor.

    Raises:
        InvalidFile: not a safetensors file, or an invalid header.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise InvalidFile(f"cannot be read: not safetensors: {size:,} bytes, with a header of {length:,}")
        try:
            header = parse_json(file.read(length))
        except InvalidFile as error:
            raise InvalidFile(f"cannot be read: its safetensors header is {error}") from None
    if not isinstance(header, dict):
        raise InvalidFile("cannot be read: not safetensors: its header is not a JSON object")
    return {name: _tensor_header(name, entry) for name, entry in header.items() if name != "__metadata__"}


def _tensor_header(name: str, entry: Any) -> TensorHeader:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise InvalidFile(f"cannot be read: its safetensors header has no valid dtype or shape for {name!r:.80}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidFile(f"cannot be read: its safetensors header has an invalid shape for {name!r:.80}")
    return TensorHeader(dtype, tuple(shape))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a file with safetensors, for torch, after checking its header.

    Raises:
        InvalidFile: as `read_tensor_header`, or the library rejects the file, also inside the context.
    """
    read_tensor_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise InvalidFile(f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InvalidFile(f"cannot be read: {error}") from None
