"""Files that are on the disk completely or not at all, whatever stops the program or the machine.

A file is written beside its target, synced and renamed into place, and then its folder is synced; a line is appended
and synced. No symlink is followed when writing. An error of the system becomes a `DiskError`.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT}


class DiskError(OSError):
    """A file could not be written; names the file and what to do."""

    def __init__(self, path: Path, reason: str, number: int | None = None) -> None:
        super().__init__(number, reason, str(path))

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write or replace a file, readable by its owner only."""
    staging = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            _write(staging, content, os.O_TRUNC)
            os.replace(staging, path)
        except OSError:
            remove_if_present(staging)
            raise
        fsync_path(path.parent)


def append_line_synced(path: Path, line: str) -> None:
    """Append a line and its newline. If the disk is full, remove the part that was written."""
    with disk_errors(path):
        before = path.stat().st_size if path.exists() else None
        try:
            _write(path, line + "\n", os.O_APPEND)
        except OSError:
            if before is not None:
                os.truncate(path, before)
            else:
                remove_if_present(path)
            raise
        if before is None:
            fsync_path(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. At the end its files are synced and it replaces ``folder`` by a rename; after an
    error it is removed."""
    staging, previous = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "replaced"))
    make_private_folder(folder.parent)
    with disk_errors(folder):
        remove_if_present(staging)
        staging.mkdir()
        try:
            yield staging
            for path in [*sorted(staging.rglob("*")), staging]:
                fsync_path(path)
            remove_if_present(previous)
            if os.path.lexists(folder):
                os.replace(folder, previous)
            os.replace(staging, folder)
        except BaseException:
            remove_if_present(staging)
            raise
        fsync_path(folder.parent)
        remove_if_present(previous)


def make_private_folder(folder: Path) -> None:
    """Create a folder, readable by its owner only, and the missing folders above it."""
    if not folder.is_dir():
        make_private_folder(folder.parent)
        with disk_errors(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            fsync_path(folder.parent)


def remove_if_present(path: Path) -> None:
    """Remove a file, a symlink (never its target), or a folder with its contents. Errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def fsync_path(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context in which an error of the system becomes a `DiskError` that names ``path``."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # safetensors gives the number only in its message
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        reason = os.strerror(number) if number else str(error)
        if number in NO_SPACE_ERRNOS:
            free = ""
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(path.parent).free:,} bytes free)"
            reason += f"{free}: make room on the disk of {path.parent}"
        raise DiskError(path, reason, number) from None


def _write(path: Path, content: str | bytes, flags: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        rest = memoryview(content.encode("utf-8") if isinstance(content, str) else content)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)
