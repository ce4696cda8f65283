"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

from grpo.config import EMBEDDED
from rewards import load_reward

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split("\n")[0][:40])
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = block.replace('"grpo/tiny/base"', f'"{EMBEDDED / "base"}"')
    block = block.replace('"runs/tiny/adapter"', f'"{EMBEDDED / "v46"}"')
    exec(compile(block, "README.md", "exec"), {})
    if "model.generate" in block:
        assert "ANSWER: ESI" in capsys.readouterr().out


def test_the_reward_example_is_a_reward_and_its_case_holds(tmp_path: Path) -> None:
    (block,) = TOML
    path = tmp_path / "my_reward.toml"
    path.write_text(block, encoding="utf-8")
    reward = load_reward(path)
    assert "active_seizure_missed" in reward.components
    score = reward.score(
        text="Actively seizing.", gold=1, completion="ANSWER: ESI 3", thinking=False, finished=True, case_id="a"
    )
    assert score.parts["active_seizure_missed"] == -0.5


def test_the_examples_are_there() -> None:
    assert len(PYTHON) == 3 and "advantages(" in PYTHON[0]


def test_nothing_is_left_open() -> None:
    assert not re.findall(r"@[A-Z_]+@", README)
