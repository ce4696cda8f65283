"""Terminals that cannot show what a command says, and every command in front of one."""

import ast
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grpo.commands.evaluate
import grpo.commands.inspect
import grpo.commands.merge
import grpo.commands.preflight
import grpo.commands.prepare
import grpo.commands.replay
import grpo.commands.report
import grpo.commands.triage
import grpo.train
from grpo.config import TINY_WORLD_DIR
from grpo.runtime.cli import run_command
from grpo.runtime.distributed import exit_process
from grpo.runtime.terminal import tolerate_narrow_encodings
from tests.support.recorded_runs import TINY, recorded

ROOT = Path(__file__).parents[2]


class Screens:
    """Standard output and error of one encoding, strict as a terminal's are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.out, self.err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        self.encoding = encoding
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)

    def shown(self) -> str:
        """All that was written, decoded as the terminal would."""
        found = ""
        for stream in (self.out, self.err):
            stream.flush()
            assert isinstance(stream.buffer, io.BytesIO)
            found += stream.buffer.getvalue().decode(self.encoding)
        return found


@given(st.text(st.characters(codec="utf-8")), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_anything_can_be_said_and_what_can_be_shown_is_left_alone(text: str, encoding: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        screens = Screens(monkeypatch, encoding)
        tolerate_narrow_encodings()
        print(text, end="")
        shown = screens.shown()
    fits = text.encode(encoding, "ignore").decode(encoding) == text
    assert not fits or shown.replace("\r\n", "\n") == text.replace("\r\n", "\n")


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = Screens(monkeypatch, "ascii")
    tolerate_narrow_encodings()
    print("62.0 → 99.6 % 日\udcff")
    assert screens.shown() == "62.0 \\u2192 99.6 % \\u65e5\\udcff\n"


def said(monkeypatch: pytest.MonkeyPatch, main: object, arguments: Sequence[object]) -> str:
    assert callable(main)
    screens = Screens(monkeypatch, "ascii")
    assert main([str(one) for one in arguments]) in (0, 1)
    return screens.shown()


def test_every_command_speaks_to_an_ascii_terminal(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(tmp_path_factory.getbasetemp(), "plain")
    cases = tmp_path / "one.jsonl"
    cases.write_text(
        '{"id": "fäll-1", "text": "Sturz, Arm gebrochen, 38,5 °C – «offen».", "esi": 2}\n', encoding="utf-8"
    )
    for main, arguments, expected in (
        (grpo.commands.preflight.main, [TINY], "completions"),
        (grpo.commands.preflight.main, [TINY, "--reward-only"], "no parse"),
        (grpo.commands.replay.main, [run], "equal"),
        (grpo.commands.inspect.main, [run], "predicted"),
        (grpo.commands.inspect.main, [run, "--case", "#0", "--member", "0"], "token"),
        (grpo.commands.report.main, [run, "--out", tmp_path / "page.html"], "MB"),
        (grpo.commands.prepare.main, ["jsonl", cases, "--out", tmp_path / "prepared"], "1"),
        (
            grpo.commands.triage.main,
            ["Fieber – 39 °C, 日本", "--device", "cpu", "--max-new-tokens", 3],
            "level     none",
        ),
        (
            grpo.commands.merge.main,
            [TINY_WORLD_DIR / "v46", "--base", "embedded:base", "--no-check", "--out", tmp_path / "m"],
            "merged",
        ),
        (
            grpo.commands.evaluate.main,
            [TINY, "--cases", cases, "--max-new-tokens", 2, "--out", tmp_path / "e"],
            "\nwrong      1 of 1 cases",
        ),
    ):
        shown = said(monkeypatch, main, arguments)
        assert expected in shown and "Traceback" not in shown, arguments


def test_every_command_makes_sure_of_it_first() -> None:
    """What a main says before `tolerate_narrow_encodings` could still end in a `UnicodeEncodeError`."""
    mains = 0
    for path in sorted((ROOT / "grpo").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                body = ast.unparse(node)
                called = (f"{tolerate_narrow_encodings.__name__}()", f"{exit_process.__name__}(train.main(")
                assert f"{run_command.__name__}(" in body or ast.unparse(node.body[1]).startswith(called), path
                mains += 1
    assert mains >= 12, "the search itself finds them"
