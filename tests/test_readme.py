"""The examples of README.md and of the folders' pages run as they stand, and their figures are the records."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest

from grpo.config import TINY_WORLD_DIR
from rewards import load_reward

ROOT = Path(__file__).parent.parent
FOLDERS = ("grpo", "rewards", "configs", "benchmarks")
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in sorted([ROOT / "README.md", *(p for f in FOLDERS for p in (ROOT / f).rglob("README.md"))])
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


README = text_of("README.md")
PYTHON = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)]
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split("\n")[0][:40])
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = block.replace('"grpo/tiny/base"', f'"{TINY_WORLD_DIR / "base"}"')
    block = block.replace('"runs/tiny/adapter"', f'"{TINY_WORLD_DIR / "v46"}"')
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


def test_the_loop_is_printed_as_it_is() -> None:
    """The body of `train()`, without its docstring and at most 45 lines long."""
    source = (ROOT / "grpo" / "train.py").read_text(encoding="utf-8")
    loop = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "train")
    _, first, *_ = loop.body
    body = textwrap.dedent("\n".join(source.split("\n")[first.lineno - 1 : loop.end_lineno]))
    assert len(body.split("\n")) <= 45
    assert re.findall(r"```py\n(.*?)\n```", README, re.DOTALL) == [body]


def test_the_examples_are_there() -> None:
    assert len(PYTHON) == 4 and any("advantages(" in block for block in PYTHON)


@pytest.mark.parametrize("folder", [p for p in (ROOT / "grpo").iterdir() if (p / "__init__.py").is_file()], ids=str)
def test_every_folder_has_a_page(folder: Path) -> None:
    assert (folder / "README.md").is_file()


def test_the_first_page_is_short() -> None:
    assert len(README.encode()) <= 12_300


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_open(page: str) -> None:
    assert not re.findall(r"@[A-Z_]+@", text_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """To a file beside the page, or to a heading as GitHub names it."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text)
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for link in links:
        file, _, heading = link.partition("#")
        assert (ROOT / page).parent.joinpath(file or Path(page).name).is_file(), link
        assert not heading or file or heading in headings, link


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_that_are_there(page: str) -> None:
    files = re.findall(
        r"(?<![\w/])(?:benchmarks|configs|tests|grpo|rewards)/[\w/]+\.(?:py|toml|json|sh|md|svg)", text_of(page)
    )
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_figures_beside_the_peer_are_the_records() -> None:
    page, first_page = text_of("benchmarks/README.md"), " ".join(README.split())
    for record in ("step", "step_vocabulary"):
        found = json.loads((ROOT / "benchmarks" / f"{record}.json").read_text())
        medians = []
        for name in ("engine", "generate"):
            for phase in ("rollout", "update", "step"):
                ratio = found["summary"][name][phase]["ratio"]
                shown = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
                assert shown in page, (record, name, phase, shown)
                medians += [f"{ratio['median']:.2f}"] if name == "engine" else []
        if record == "step":
            rollout, update, step = medians
            engine, trl = (found["memory"][name]["peak_bytes"] / 1e6 for name in ("engine", "trl"))
            assert f"takes {step} of the time" in first_page and f"(rollout {rollout}, update {update};" in first_page
            assert f"in {engine:,.0f} MB instead of {trl:,.0f}" in first_page


def test_the_figures_on_paper_are_the_records() -> None:
    found = json.loads((ROOT / "benchmarks" / "on_paper.json").read_text())
    assert found["layers"] == 32 and found["tokens"] == 8 * 1024
    page = text_of("benchmarks/README.md")
    for row in (found["decode_step"], found["phases"]["rollout"], found["phases"]["update"]):
        assert f"| {row['launches']:,} |" in page and f"| {row['peak_bytes'] / 1e9:.1f} GB |" in page
        assert f"| {sum(row['waits'].values())} |" in page
    assert f"{found['decode_step']['launches']} kernels" in page
