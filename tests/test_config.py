"""The config: every shipped file loads, and every mistake is named with file, line, key and a way out."""

import subprocess
import sys
import typing
from pathlib import Path

import pytest

from grpo import loss
from grpo.advantage import ADVANTAGES
from grpo.cases import LOADERS
from grpo.config import (
    RENAMED_KEYS,
    AdvantageSection,
    CasesSection,
    LossSection,
    OptimSection,
    load_config,
    upgrade_recorded_config,
)
from grpo.runtime.errors import UserError
from grpo.update import LR_SCHEDULES

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.toml"
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = TINY.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / "edited.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config, source = load_config(path)
    assert config.name == path.stem and source.text == path.read_text(encoding="utf-8")


def test_v49_holds_the_values_the_card_states() -> None:
    config, _ = load_config(ROOT / "configs" / "v49.toml")
    assert (config.model.name, config.lora.r, config.rollout.max_new_tokens) == ("Qwen/Qwen3.5-9B", 32, 1024)
    assert (config.train.steps, config.optim.learning_rate, config.evaluate.temperature) == (300, 2e-7, 0.1)
    assert config.cases.oversample == {1: 5} and config.evaluate.thinking == ("on", "off")
    assert config.cases.system_prompt.endswith("Be concise — stay under 150 words total.")


def test_every_value_of_v49_carries_its_grade() -> None:
    lines = (ROOT / "configs" / "v49.toml").read_text(encoding="utf-8").splitlines()
    free = {"version", "name", "periodic", "target_modules", "system_prompt"}
    for number, line in enumerate(lines):
        key = line.split("=")[0].strip()
        if "=" in line and not line.startswith("#") and key.isidentifier() and (key not in free or "Qwen" in line):
            assert any(grade in line for grade in ("KNOWN", "INFERRED", "UNKNOWN", "a choice of ours", "own grade")), (
                f"line {number + 1}: {line}"
            )


def test_unknown_key_names_file_line_and_what_was_meant(tmp_path: Path) -> None:
    path = edited(tmp_path, "learning_rate = ", "learning_rte = ")
    line = path.read_text().splitlines().index(next(x for x in path.read_text().splitlines() if "rte" in x)) + 1
    message = error_of(path)
    assert f"{path}:{line}: unknown key optim.learning_rte; did you mean learning_rate?" in message
    assert "missing key optim.learning_rate;" in message


def test_unknown_section_is_refused(tmp_path: Path) -> None:
    assert "did you mean rollout?" in error_of(edited(tmp_path, "[rollout]", "[rolout]"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.group_size=1", "greater than or equal to 2, got 1"),
        ("evaluate.ends={}", "unknown key evaluate.ends; it is now evaluate.before_and_after"),
        ("rollout.group_size=8.0", "valid integer"),
        ("rollout.temperature=0.0", "greater than or equal to 0.000001"),
        ("evaluate.temperature=1e-45", "expected 0 (greedy) or at least 1e-06"),
        ('evaluate.thinking=["on", "on"]', "thinking contains a mode twice"),
        ("rollout.temperature=inf", "finite"),
        ("optim.micro_batch_size=65", "exceeds the 64 completions of a step"),
        ("optim.micro_batch_tokens=0", "optim.micro_batch_tokens: Input should be greater than or equal to 1"),
        ("optim.micro_batch_tokens=auto", "optim.micro_batch_tokens: Input should be a valid integer"),
        ("optim.warmup_steps=60", "fewer than train.steps × optim.inner_epochs"),
        ("loss.kl=k9", "'k1', 'k2', 'k3' or 'ratio_k3'"),
        ("loss.surrogate=dual_clip", "set both or neither"),
        ("loss.dual_clip=3.0", "set both or neither"),
        ("lora.warm_start=''\nloss.reference=warm_start", "requires an adapter in lora.warm_start"),
        ("cases.oversample={6=2}", "less than or equal to 5"),
        ("cases.oversample={one=2}", "valid integer"),
        ("name=../x", "should match pattern"),
        ("model.device=tpu", "should match pattern"),
        ("evaluate.periodic={test='a.jsonl'}", "test: expected in either before_and_after or periodic, found in both"),
        ("train.steps=0", "greater than or equal to 1"),
        ("train.steps", "expected section.key=value"),
        ("train.steps.more=1", "is a value, not a section"),
        ("lora.target_modules=q_proj", "valid tuple"),
        ("lora.target_modules=5", "valid tuple"),
        ('lora.target_modules=["q_proj", "v_proj", "q_proj"]', "duplicates: q_proj"),
        ("evaluate.thinking=[]", "at least 1 item"),
        ("evaluate.thinking=on", "valid tuple"),
        ("cases.oversample={01=2}", "valid integer"),
        (f"train.seed={2**63}", "less than"),
    ],
)
def test_bad_values_are_refused_by_name(override: str, says: str) -> None:
    assert says in error_of(TINY, *override.split("\n"))


def test_overrides_are_laid_over_and_recorded() -> None:
    config, source = load_config(TINY, ["train.steps=2", "loss.kl=k2", "cases.oversample={1=5}"])
    assert (config.train.steps, config.loss.kl, config.cases.oversample) == (2, "k2", {1: 5})
    assert source.overrides == ("train.steps=2", "loss.kl=k2", "cases.oversample={1=5}")


def test_files_that_are_not_a_config(tmp_path: Path) -> None:
    assert "shipped with this program are configs/tiny.toml" in error_of(tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    assert "not valid TOML" in error_of(broken)
    broken.write_bytes(b"name = '\xff'")
    assert "not UTF-8 (byte 8)" in error_of(broken)
    assert "this program reads config version 2" in error_of(edited(tmp_path, "version = 2", "version = 3"))


OLD_KEYS = {
    "version = 2": "version = 1",
    "before_and_after =": "ends =",
    "periodic =": "during =",
    "resample_rounds =": "refill_rounds =",
    "max_nonfinite_steps =": "max_skipped_steps =",
    'kind = "group"': 'kind = "none"',
}
"""Text of configs/tiny.toml → the same in config version 1."""


def test_version_1_is_refused_with_the_renames(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "tiny.toml").read_text()
    for new, old in OLD_KEYS.items():
        assert text.count(new) == 1, new
        text = text.replace(new, old)
    (tmp_path / "old.toml").write_text(text)
    assert error_of(tmp_path / "old.toml").splitlines()[1:] == [
        "  evaluate.ends → evaluate.before_and_after",
        "  evaluate.during → evaluate.periodic",
        "  rollout.refill_rounds → rollout.resample_rounds",
        "  train.max_skipped_steps → train.max_nonfinite_steps",
        '  advantage.kind = "none" → "mean_only"',
    ]


def test_a_recorded_config_of_version_1_is_upgraded() -> None:
    config, _ = load_config("configs/tiny.toml", ['advantage.kind="mean_only"'])
    recorded = config.model_dump(mode="json")
    old = {key: dict(value) if isinstance(value, dict) else value for key, value in recorded.items()} | {"version": 1}
    for old_name, new_name in RENAMED_KEYS.items():
        (section, old_key), new_key = old_name.split("."), new_name.split(".")[1]
        old[section][old_key] = old[section].pop(new_key)
    old["advantage"]["kind"] = "none"
    assert upgrade_recorded_config(old) == recorded
    assert upgrade_recorded_config(recorded) == recorded


def test_a_shipped_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/tiny.toml")[0].name == "tiny"


@pytest.mark.parametrize("name", ["nosuch/configs/tiny.toml", "../configs/tiny.toml", "tiny.toml"])
def test_another_path_is_never_taken_for_a_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such config"):
        load_config(name)


def test_an_override_is_one_key_on_one_line() -> None:
    with pytest.raises(UserError, match="on one line"):
        load_config(TINY, ["train.steps=2\ntrain.x=3"])


def test_the_config_offers_exactly_the_entries_of_the_tables() -> None:
    offered = {
        name: set(typing.get_args(model.model_fields[name].annotation))
        for model, name in (
            (LossSection, "surrogate"),
            (LossSection, "kl"),
            (LossSection, "token_weights"),
            (AdvantageSection, "kind"),
            (OptimSection, "schedule"),
            (CasesSection, "format"),
        )
    }
    assert offered == {
        "surrogate": set(loss.SURROGATES),
        "kl": set(loss.KL_ESTIMATORS),
        "token_weights": set(loss.TOKEN_WEIGHTS),
        "kind": set(ADVANTAGES),
        "schedule": set(LR_SCHEDULES),
        "format": set(LOADERS),
    }


def test_reading_a_config_imports_no_torch() -> None:
    code = (
        "import sys; from grpo.config import load_config; load_config('configs/v49.toml'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "False"
