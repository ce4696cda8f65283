"""Files whole or not at all, in an order that a power cut cannot betray; and nothing written through a symlink."""

import errno
import os
import stat
from pathlib import Path

import pytest

from grpo.runtime.atomic_files import (
    DiskError,
    append_line_synced,
    atomic_folder,
    make_private_folder,
    remove_if_present,
    write_atomic,
)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(call, name of the file) of every fsync and rename, in their order."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        seen.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return seen


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    write_atomic(tmp_path / "a", "text")
    assert events == [("fsync", ".a.partial"), ("rename", "a"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a").read_text() == "text" and os.listdir(tmp_path) == ["a"]


def test_a_line_is_synced_and_a_new_files_folder_too(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    append_line_synced(tmp_path / "a", "one")
    append_line_synced(tmp_path / "a", "two")
    assert events == [("fsync", "a"), ("fsync", tmp_path.name), ("fsync", "a")]
    assert (tmp_path / "a").read_text() == "one\ntwo\n"


def test_all_in_a_folder_is_synced_before_it_takes_its_place(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with atomic_folder(tmp_path / "new" / "f") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "x").write_text("x")
        (aside / "y").write_text("y")
        assert not (tmp_path / "new" / "f").exists()
    before = events[: events.index(("rename", "f"))]
    assert [name for _, name in before] == [tmp_path.name, "inner", "x", "y", ".f.partial"]
    assert events[len(before) + 1 :] == [("fsync", "new")]
    with atomic_folder(tmp_path / "new" / "f") as aside:
        (aside / "z").write_text("z")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["f"]
    assert [p.name for p in (tmp_path / "new" / "f").iterdir()] == ["z"], "the folder before is gone with all in it"


def test_what_fails_in_a_folder_leaves_nothing_of_it(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "f") as aside:
        (aside / "kept").touch()
    with pytest.raises(KeyError), atomic_folder(tmp_path / "f") as aside:
        (aside / "x").touch()
        raise KeyError
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["f", "f/kept"]


def test_a_full_disk_is_one_error_that_says_what_to_do_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", "before")
    append_line_synced(tmp_path / "lines", "before")
    write = os.write

    def half(handle: int, content: bytes) -> int:
        if len(content) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, bytes(content)[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    for act in (write_atomic, append_line_synced):
        for name in ("a" if act is write_atomic else "lines", "new"):
            with pytest.raises(DiskError, match=r"No space left on device \([\d,]+ bytes free\): make room on") as told:
                act(tmp_path / name, "a longer text")
            assert str(tmp_path / name) in str(told.value)
    assert (tmp_path / "a").read_text() == "before" and (tmp_path / "lines").read_text() == "before\n"
    assert sorted(os.listdir(tmp_path)) == ["a", "lines"], "nothing half written is left to take room"


def test_no_symlink_is_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    inside = tmp_path / "run"
    make_private_folder(inside)
    for name in ("lines", ".whole.partial"):
        (inside / name).symlink_to(outside)
    with pytest.raises(DiskError, match="lines: cannot be written"):
        append_line_synced(inside / "lines", "theirs")
    with pytest.raises(DiskError, match="whole: cannot be written"):
        write_atomic(inside / "whole", "theirs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    (inside / ".f.partial").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(inside / "f") as aside:
        (aside / "x").write_text("ours")
    remove_if_present(inside / "nothing")
    assert outside.read_text() == "mine" and (tmp_path / "elsewhere" / "x").read_text() == ""
    assert (inside / "f" / "x").read_text() == "ours"


def test_what_is_made_is_its_owners_alone(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "b")
    write_atomic(tmp_path / "a" / "b" / "c", "x")
    append_line_synced(tmp_path / "a" / "b" / "d", "x")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").rglob("*")}
    assert modes == {"b": 0o700, "c": 0o600, "d": 0o600} and stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
