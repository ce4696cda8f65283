"""The suite under an odd environment: what reaches a test, and a process that it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.runtime.terminal import screen_width
from tests.support.environment import OBEYED

ODD = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "0", "RANK": "1",
       "WORLD_SIZE": "2", "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "always", "PYTHONUTF8": "0"}  # fmt: skip
INSIDE = """
import os, subprocess, sys
from huggingface_hub import constants
def test_inside():
    child = subprocess.run([sys.executable, "-c", "import os; print(*os.environ)"], stdout=-1, encoding="utf-8")
    present = {*os.environ, *child.stdout.split()} & {names}
    print("FOUND", os.environ["TZ"], constants.HF_HOME, present)
"""


def test_no_variable_that_the_program_obeys_reaches_a_test(tmp_path: Path) -> None:
    assert not {name for name in ODD if not OBEYED.fullmatch(name)}
    (tmp_path / "test_inside.py").write_text(INSIDE.replace("{names}", repr({*ODD})), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-s", "-p", "no:cacheprovider", tmp_path]
    environment = os.environ | ODD | {"TZ": "Pacific/Chatham"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
    assert f"FOUND Pacific/Chatham {os.devnull}/hub set()" in done.stdout, done.stdout


def test_a_file_is_80_columns_wide_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "__stdout__", file)
        assert screen_width() == 80


GIVEN = os.umask(0o077)
os.umask(GIVEN)


@pytest.mark.parametrize("mask", [0o055, 0o066])
def test_each_test_begins_with_the_given_mask(mask: int) -> None:
    assert os.umask(mask) == GIVEN
