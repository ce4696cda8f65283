"""The command line `grpo COMMAND`: what it lists is what it runs."""

import subprocess
import sys
from pathlib import Path

import pytest

import grpo.__main__
from grpo.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


def test_every_command_file_is_listed() -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "grpo" / "commands").glob("*.py")} - {"--init--"}
    assert files == set(COMMANDS)


def test_help_lists_each_command_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from grpo.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, summary in COMMANDS.items():
        assert f"  {name:<12} {summary}\n" in done.stdout
    assert main([]) == 0
    assert capsys.readouterr().out == done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.removeprefix("usage: ").removeprefix("python -m ").startswith(f"grpo {name} ")


def test_arguments_and_exit_codes_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Command:
        @staticmethod
        def main(argv: list[str]) -> int:
            assert argv == ["runs/tiny", "--step", "3"]
            return 7

    monkeypatch.setattr(grpo.__main__.importlib, "import_module", {"grpo.commands.inspect": Command}.__getitem__)
    assert main(["inspect", "runs/tiny", "--step", "3"]) == 7


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalaute", "CONFIG"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'evalaute'; expected one of train, ")
