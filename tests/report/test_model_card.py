"""The card of a run: its figures, its grades, and that nothing of a run or a case becomes markup or leaks."""

import html
import json
import math
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.commands.merge import merge
from grpo.config import TINY_WORLD_DIR, key_comments, load_config
from grpo.inspection.run_reader import read_run
from grpo.report.evaluation import RATES, EvaluatedSet, evaluated_sets
from grpo.report.model_card import (
    MAX_CELL_CHARS,
    escape,
    model_card,
    training_table,
    write_model_card,
)
from grpo.run.folder import RunFolder, append_metrics, create_run, write_json
from grpo.runtime.errors import UserError
from rewards import load_reward, parse_answer

SECRET = "Zoster at the left temple"
"""What a case says; it must never be in a card."""


def evaluation(step: int, exact: float, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "cases": "mietic36", "thinking": "on", "n": 36, "exact": exact, "adjacent": 1.0,
        "dangerous_under": 0.0, "high_acuity_under": 0.28, "high_acuity_n": 25, "no_parse": 0.0, "clipped_ratio": 0.0,
        "mean_length": 60.0,
        "by_rule": {"severe_pain_missed": {"n": 2, "exact": exact}, "never": {"n": 0, "exact": None}},
        "by_tag": {SECRET: {"n": 1, "exact": 1.0}},
        "confusion": {str(level): [n, 0, 0, 0, 0, 0] for level, n in enumerate((14, 11, 5, 4, 2), 1)},
    } | values  # fmt: skip


def make_run(folder: Path, *overrides: str) -> RunFolder:
    config, source = load_config("configs/v49.toml", overrides)
    run = create_run(folder, config, source, load_reward(config.reward.set), device="cpu")
    for step in range(1, 21):
        record = {"step": step, "reward/mean": step / 10 - 1, "completions/clipped_ratio": 0.19 - step / 200}
        append_metrics(
            run, record | {"grad_norm": math.nan if step == 3 else 0.5, "time/rollout_s": 200.0, "skipped": 0}
        )
    write_json(run.evaluations, [evaluation(0, 0.5), evaluation(150, 0.75), evaluation(300, 28 / 36)])
    (run.path / "eval").mkdir()
    (run.path / "eval" / "a.jsonl").write_text(json.dumps({"id": "x", "completion": SECRET}))
    return run


def table(card: str, title: str) -> list[list[str]]:
    """The cells of the first table after a title."""
    rows = re.search(r"(?:^\|.*\n)+", card[card.index(title) :], re.MULTILINE)
    assert rows
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].strip().splitlines()]


# --- escaping --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60) | st.text(alphabet="_ab \n|<>*[]()!`~\\#&@:/.w-", max_size=60))
def test_an_escaped_value_is_one_line_of_plain_text(value: str) -> None:
    shown = escape(value)
    assert len(shown.splitlines()) <= 1 and not set("\\`*[]|~$<>@") & set(shown) and "://" not in shown
    assert not re.search(r"&(?!#\d+;)", shown)
    assert not re.search(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", shown)
    plain = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in value)
    assert html.unescape(shown) == plain


def test_long_values_are_cut() -> None:
    assert escape("x" * (MAX_CELL_CHARS + 1)) == "x" * (MAX_CELL_CHARS - 1) + "…"


HOSTILE = '</td><script>alert(1)</script> | ![x](http://e.x/y) `code` **b** \\u202e"""'


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    reason = json.dumps(HOSTILE)
    prompt = json.dumps('Say "the level".\n```\n<b>now</b>')
    run = make_run(
        tmp_path / "run",
        "reward.allow_unsound=true",
        f"reward.unsound_reason={reason}",
        f"cases.system_prompt={prompt}",
        f"lora.warm_start={reason}",
        f"evaluate.before_and_after={{x={reason}}}",
    )
    write_json(run.evaluations, [evaluation(0, 0.5, by_rule={HOSTILE: {"n": 1, "exact": 1}})])
    plain = model_card(make_run(tmp_path / "plain").path)
    for merged in (False, True):
        card = model_card(run.path, merged=merged)
        assert "<script" not in card and "![" not in card and "http://" not in card and "\u202e" not in card
        assert card.count("```") == plain.count("```") == 2
        code = card.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert "<b>" not in card.replace(code, "")
    for row in table(card, "## Recipe"):
        assert len(row) == 4, row


def test_no_case_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "cases.train=/home/someone/data/secret.jsonl")
    for merged in (False, True):
        card = model_card(run.path, merged=merged)
        assert SECRET not in card and "/home/someone" not in card and str(tmp_path) not in card
        assert "secret.jsonl" in card


# --- recipe ----------------------------------------------------------------------------------------------------------


def test_comments_belong_to_their_keys() -> None:
    text = """# of the file
[a]
x = 1   # of x
# of nothing
y = "# no comment"      # of y
z = \"\"\"a = 2 # text
[b]
\"\"\"   # of z
w = [1, 2]
    # of w
    # and more
[b.c]  # of the section
'q' = 3
v = '#'
"""
    assert key_comments(text) == {"a.x": "of x", "a.y": "of y", "a.z": "of z", "a.w": "of w and more"}


def test_every_value_of_the_shipped_recipe_has_its_grade(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "train.steps=20")
    rows = {row[0]: row[1:] for row in table(model_card(run.path), "## Recipe")}
    assert rows["lora.r"] == ["32", "known", ""]
    assert rows["lora.alpha"][:2] == ["32", "inferred"]
    assert rows["cases.oversample"][:2] == ["1 = 5", "known"]
    assert rows["optim.schedule"][1] == "unknown"
    assert rows["cases.system_prompt"][1] == "known"
    assert rows["train.steps"][:2] == ["20", "set"] and rows["train.steps"][2].startswith("v49: ")
    assert rows["lora.target_modules"][1] == "inferred" and "the only set" in rows["lora.target_modules"][2]
    ungraded = {
        "key", "---", "cases.format", "cases.strict", "evaluate.batch_size", "evaluate.periodic", "ledger.every",
        "ledger.text", "loss.dual_clip", "model.kernels", "optim.micro_batch_size",
        "optim.micro_batch_tokens", "reward.allow_unsound", "reward.overlong", "reward.unsound_reason", "reward.set",
        "rollout.ignore_eos", "train.max_nonfinite_steps", "train.rank_timeout_s",
    }  # fmt: skip
    assert {key for key, row in rows.items() if not row[1]} <= ungraded


def test_the_reward_is_shown_with_its_grades(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run").path)
    grades = {row[0]: (row[1], row[2]) for row in table(card, "| reward |")[2:]}
    assert "Reward set v49: v46's table with rule-aware modifiers" in card
    assert grades["no parse"] == ("-2", "known") and grades["exact"] == ("+1", "inferred")
    assert (
        grades["severe&#95;pain&#95;missed"] if "severe&#95;pain&#95;missed" in grades else grades["severe_pain_missed"]
    )
    assert all(grade in ("known", "inferred", "unknown") for _, grade in grades.values())


# --- figures ---------------------------------------------------------------------------------------------------------


def test_training_figures_are_means_of_tenths_and_extremes(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run").path)
    rows = {row[0]: row[1:] for row in table(card, "## Training")}
    assert rows["metric"] == ["first 2 steps", "last 2 steps", "least", "greatest"]
    assert rows["reward/mean"] == ["-0.85", "0.95", "-0.9", "1"]
    assert rows["grad_norm"] == ["0.5"] * 4
    assert "20 steps in 1.11 h of rollouts and updates, 200 s per step." in card
    assert training_table([]) is None
    one = training_table([{"step": 1, "reward/mean": None, "entropy": 0.5, "skipped": 2}])
    assert (
        one and [row["metric"] for row in one["rows"]] == ["entropy"] and "2 updates were not finite" in one["summary"]
    )


def test_evaluations_are_first_and_last_with_intervals_and_constants(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run").path)
    assert "### mietic36 (36 cases, 25 of them of ESI 1 or 2)" in card
    rows = {row[0]: row[1:] for row in table(card, "### mietic36")}
    assert list(rows) == ["model", "---", "before training", "step 300", *(f"always {k}" for k in range(1, 6))]
    assert rows["step 300"][:3] == ["on", "77.8 % (61.9–88.3)", "100.0 % (90.4–100.0)"]
    assert rows["always 1"][1] == "38.9 %" and rows["always 2"][2] == "83.3 %", "as SERIES of the real 36 says"
    assert rows["always 3"][1:] == ["13.9 %", "55.6 %", "38.9 %", "100.0 %", "–", "–"]
    assert table(card, "Exact where a rule")[2:] == [
        ["severe_pain_missed", "on", "2", "50.0 % (9.5–90.5)", "77.8 % (21.2–97.9)"]
    ]


def tables_of(tmp_path: Path, record: dict[str, Any]) -> list[EvaluatedSet]:
    run = make_run(tmp_path / "run")
    write_json(run.evaluations, [record])
    tables = evaluated_sets(read_run(run.path))
    shutil.rmtree(run.path)
    return tables


def test_under_triage_of_esi_1_and_2_is_shown_as_a_share_of_them(tmp_path: Path) -> None:
    column = [field for field, _, _ in RATES].index("high_acuity_under")
    (shown,) = tables_of(tmp_path, evaluation(9, 0.5))
    assert shown.rows[0]["cells"][column] == "28.0 % (14.3–47.6)", "7 of 25, not of 36"
    (none,) = tables_of(tmp_path, evaluation(9, 0.5, high_acuity_under=None, high_acuity_n=0))
    assert none.rows[0]["cells"][column] == "–"
    old = {key: value for key, value in evaluation(9, 0.5).items() if key != "high_acuity_n"}
    (before,) = tables_of(tmp_path, old)
    assert before.rows[0]["cells"][column] == "–", "a record without high_acuity_n meant a share of all cases"


def test_recorded_intervals_are_shown(tmp_path: Path) -> None:
    (shown,) = tables_of(tmp_path, evaluation(9, 0.5, intervals={"exact": [0.1, 0.9]}))
    assert shown.rows[0]["cells"][:2] == ["50.0 % (10.0–90.0)", "100.0 % (90.4–100.0)"]


def test_a_confusion_matrix_of_other_counts_gives_no_constants(tmp_path: Path) -> None:
    (shown,) = tables_of(tmp_path, evaluation(9, 0.5, confusion={"1": [2**40, 0, 0, 0, 0, 0]}))
    assert [row["model"] for row in shown.rows] == ["step 9"]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    adapter, merged = model_card(run.path), model_card(run.path, merged=True)
    for card in (adapter, merged):
        assert card.count("Research model, not approved for clinical use") == 2
        assert card.startswith("---\n") and 'base_model: "Qwen/Qwen3.5-9B"\n' in card.split("---\n")[1]
        assert "max_new_tokens=1024, temperature=0.1, do_sample=True" in card and "Be concise — stay under" in card
        assert not re.search(r"\n\n\n|[ \t]\n", card) and card.endswith("\n")
        assert model_card(run.path, merged=card is merged) == card
    assert "library_name: peft" in adapter and "PeftModel" in adapter and "r = 32, alpha = 32.0" in adapter
    assert "library_name: transformers" in merged and "PeftModel" not in merged and "merge.json" in merged


def test_a_run_without_steps_and_evaluations(tmp_path: Path) -> None:
    config, source = load_config("configs/tiny.toml")
    card = model_card(create_run(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu").path)
    assert "This run has no evaluation." in card and "This run has no training step." in card
    assert "base_model" not in card and "base    = str(TINY_WORLD_DIR / 'base')\nadapter = " in card


def usage(card: str) -> str:
    """The code under Use."""
    return card.split("```python\n")[1].split("```")[0]


def test_the_adapters_card_is_code_that_runs_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, source = load_config("configs/tiny.toml")
    run = create_run(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu")
    shutil.copytree(TINY_WORLD_DIR / "v46", run.adapter)
    card = write_model_card(run.path, run.adapter / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(run.adapter)
    torch.manual_seed(0)
    exec(compile(usage(card), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert config.cases.system_prompt in said and parse_answer(said, thinking=True).level is not None


def test_a_merged_models_card_is_code_that_runs_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, source = load_config("configs/tiny.toml")
    run = create_run(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu")
    shutil.copytree(TINY_WORLD_DIR / "v46", run.adapter)
    merge(run.adapter, tmp_path / "merged", check=False)
    code = usage((tmp_path / "merged" / "README.md").read_text(encoding="utf-8"))
    assert "peft" not in code and "grpo" not in code
    monkeypatch.chdir(tmp_path / "merged")
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert parse_answer(capsys.readouterr().out, thinking=True).level is not None


def test_a_base_of_ones_own_is_named_without_its_place(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run", 'model.name="/home/someone/models/base"').path)
    assert "base    = 'base'  # its folder\n" in usage(card) and "/home/someone" not in card
    assert "base    = 'Qwen/Qwen3.5-9B'\n" in usage(model_card(make_run(tmp_path / "hub").path))


def test_it_is_written_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.adapter.mkdir()
    path = write_model_card(run.path, run.adapter / "README.md")
    assert path.read_text(encoding="utf-8") == model_card(run.path)
    assert [file.name for file in run.adapter.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "not a run folder: it holds no config.json"),
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", '{"model_type": "x"}', "config.json: config: Field required"),
        ("config.json", '{"config": {"name": "x"}, "source": {"toml": ""}}', "config.json: version: Field required"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n', "metrics.jsonl:2: not a line of metrics"),
        ("metrics.jsonl", "3\n", "metrics.jsonl:1: not a line of metrics"),
        ("eval.json", '[{"n": 3}]', "eval.json: 0.step: Field required"),
        ("eval.json", "[3]", "eval.json: 0: "),
        ("eval.json", "[", "eval.json: not valid JSON"),
    ],
)
def test_damaged_records_are_named(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run").path / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        model_card(path.parent)
