"""Files that are on the disk whole or not at all, whatever stops the program or the machine.

A file is written aside, synced and renamed into place, and then its folder is synced; a line is appended and synced.
Where a file is written, no symlink is followed. What the disk refuses becomes one `DiskError`.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

FULL = {28, 122}
"""ENOSPC and EDQUOT: what making room mends."""


class DiskError(OSError):
    """A file that could not be written. Names it, and what to do."""

    def __init__(self, path: Path, reason: str, number: int | None = None) -> None:
        super().__init__(number, reason, str(path))

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, readable by its owner alone, in place of the one that was there."""
    aside = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            _write(aside, content, os.O_TRUNC)
            os.replace(aside, path)
        except OSError:
            discard(aside)
            raise
        sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line and its newline. What a full disk took of it is taken back."""
    with writing(path):
        before = path.stat().st_size if path.exists() else None
        try:
            _write(path, line + "\n", os.O_APPEND)
        except OSError:
            if before is not None:
                os.truncate(path, before)
            else:
                discard(path)
            raise
        if before is None:
            sync(path.parent)


@contextlib.contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """An empty folder to fill. On leaving, all in it is synced and it takes the place of ``folder`` by a rename; after
    an error nothing of it is left."""
    aside, before = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "replaced"))
    make_folder(folder.parent)
    with writing(folder):
        discard(aside)
        aside.mkdir()
        try:
            yield aside
            for path in [*sorted(aside.rglob("*")), aside]:
                sync(path)
            discard(before)
            if os.path.lexists(folder):
                os.replace(folder, before)
            os.replace(aside, folder)
        except BaseException:
            discard(aside)
            raise
        sync(folder.parent)
        discard(before)


def make_folder(folder: Path) -> None:
    """Makes the folder, readable by its owner alone, and those above it, where they are not there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with writing(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            sync(folder.parent)


def discard(path: Path) -> None:
    """Takes away a file, a symlink (never what it points to), or a folder with all in it; or nothing. What cannot be
    taken away stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is a `DiskError` that names ``path``."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors says the number in words alone
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        reason = os.strerror(number) if number else str(error)
        raise DiskError(path, reason + (_how_full(path.parent) if number in FULL else ""), number) from None


def _write(path: Path, content: str | bytes, how: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how, 0o600)
    try:
        rest = memoryview(content.encode("utf-8") if isinstance(content, str) else content)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _how_full(folder: Path) -> str:
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(folder).free:,} bytes free)"
    return f"{free}: make room on the disk of {folder}"
