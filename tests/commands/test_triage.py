"""One case, one answer: the command line from the case to the exit code."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo.commands.triage
from grpo.commands.merge import merge
from grpo.commands.triage import DEFAULT_ADAPTER, DEFAULT_MODEL, NOTICE, format_answer, main
from grpo.config import TINY_WORLD_DIR, Config, load_config
from grpo.evaluation.answers import answer as answer_cases
from grpo.policy.policy import Policy, load_policy
from grpo.run.folder import create_run
from grpo.types import Case
from rewards import load_reward

CASE = (
    "14-year-old girl, bug bite. Brought in by EMS. Tongue swelling, muffled voice and stridor. "
    "On arrival RR 17, HR 140, BP 158/102, O2 sat 95%. Treated for eczema."
)
SYSTEM = "Extract clinical fields, apply the ESI algorithm, then state the ESI level."
CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs with which cases were answered."""
    seen: list[Config] = []

    def spy(policy: Policy, cases: list[Case], config: Config, **values: Any) -> Any:
        seen.append(config)
        return answer_cases(policy, cases, config, **values)

    monkeypatch.setattr(grpo.commands.triage, "answer", spy)
    return seen


@pytest.fixture(scope="module")
def policy() -> Policy:
    config, _ = load_config("configs/tiny.toml", ["model.device=cpu", "model.dtype=float32"])
    return load_policy(config.model, config.lora, seed=0)


@pytest.fixture
def quick(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the default model once for all tests."""
    monkeypatch.setattr(grpo.commands.triage, "load_policy", lambda model, lora, seed: policy)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_it_works_out_of_the_box(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CASE, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "EXTRACTION:\nChief complaint: " in said and "\nlevel     ESI 1\n" in said
    assert said.endswith(f"notice    {NOTICE}\n") and said.count("not approved for clinical use") == 1


def test_the_answer_is_a_function_of_case_mode_and_seed(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    hot = ("--temperature", "1.5", "--max-new-tokens", "30")
    first = answer(capsys, CASE, *hot, "--seed", "1")
    assert first == answer(capsys, CASE, *hot, "--seed", "1")
    assert first[1]["text"] != answer(capsys, CASE, *hot, "--seed", "2")[1]["text"]
    code, off = answer(capsys, CASE, "--thinking", "off")
    assert (code, off["thinking"], off["level"], off["reason"], off["finished"]) == (0, False, 1, "parsed", True)
    assert str(off["text"]).startswith("EXTRACTION:") and off["notice"] == NOTICE


def test_no_level_is_said_and_is_exit_code_1(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, cut = answer(capsys, CASE, "--max-new-tokens", "5")
    assert (code, cut["level"], cut["reason"], cut["finished"]) == (1, None, "unclosed thinking", False)
    assert cut["tokens"] == 5
    assert main([CASE, "--max-new-tokens", "5"]) == 1
    assert "level     none: unclosed thinking (cut off after 5 tokens)" in capsys.readouterr().out


def test_the_budget_is_the_cards_or_what_the_context_leaves(quick: None, configs: list[Config]) -> None:
    for arguments in (["Xq " * 300], [CASE, "--max-new-tokens", "7"], [CASE]):
        main(arguments)
    long, given, short = (config.evaluate.max_new_tokens for config in configs)
    assert long < 700 and given == 7 and long < short < 1024
    assert load_config("configs/v49.toml")[0].evaluate.max_new_tokens == 1024


class Pipe:
    """Standard input that is no terminal, unless it says so."""

    def __init__(self, raw: bytes, terminal: bool = False) -> None:
        self.buffer, self.isatty = io.BytesIO(raw), lambda: terminal


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_the_case_may_come_through_a_pipe(
    arguments: list[str],
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[str] = []

    def spy(policy: Policy, cases: list[Case], config: Config, **values: Any) -> Any:
        read.append(cases[0].text)
        return answer_cases(policy, cases, config, **values)

    monkeypatch.setattr(grpo.commands.triage, "answer", spy)
    for raw in (CASE.encode(), b"\xef\xbb\xbf" + CASE.encode() + b"\r\n"):
        monkeypatch.setattr("sys.stdin", Pipe(raw))
        assert answer(capsys, *arguments, "--max-new-tokens", "2")[0] == 1
    assert read == [CASE, CASE]


BAD: dict[str, tuple[list[str], bytes, str]] = {
    "nothing": ([], b"", "as argument or standard input, got 0"),
    "blanks": (["  \n"], b"", "expected a case of 1 to 100,000 characters as"),
    "an empty pipe": (["-"], b" ", "expected a case"),
    "not UTF-8": (["-"], b"secret \xff", "the case: not UTF-8 (byte 7)"),
    "a NUL": (["secret \0"], b"", "a NUL (byte 7)"),
    "half a character": (["secret \udcff"], b"", "not UTF-8"),
    "too long": (["secret" * 20_000], b"", "got 120,000"),
    "a flood": (["-"], b"secret" * 100_000, "got 400,001"),
    "more than the context": (["secret " * 2000], b"", "the model's context is 1024: no answer fits"),
    "a budget of none": (["secret", "--max-new-tokens", "0"], b"", "evaluate.max_new_tokens"),
    "too great a budget": (["secret", "--max-new-tokens", "1020"], b"", "use at most --max-new-tokens "),
    "below zero": (["secret", "--temperature", "-1"], b"", "evaluate.temperature"),
    "too near zero": (["secret", "--temperature", "1e-45"], b"", "temperature = 1e-45: expected 0"),
    "no number": (["secret", "--temperature", "nan"], b"", "evaluate.temperature"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_without_the_case(
    name: str, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, piped, message = BAD[name]
    monkeypatch.setattr("sys.stdin", Pipe(piped, terminal=name == "nothing"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err and "secret" not in said.err


def test_models_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rslora = tmp_path / "rslora"
    shutil.copytree(TINY_WORLD_DIR / "v46", rslora)
    found = json.loads((rslora / "adapter_config.json").read_text())
    (rslora / "adapter_config.json").write_text(json.dumps(found | {"use_rslora": True}))
    merge(TINY_WORLD_DIR / "v46", tmp_path / "merged", base="embedded:base", check=False)
    for arguments, message in (
        (["--model", str(tmp_path / "none")], "no such folder"),
        (["--model", "Qwen/Qwen3.5-9B"], "hf download Qwen/Qwen3.5-9B"),
        (["--adapter", str(tmp_path / "none")], "adapter_config.json: cannot be read"),
        (["--model", DEFAULT_MODEL, "--adapter", ""], "adapter_config.json: cannot be read"),
        (["--model", ""], "model.name"),
        (["--model", str(TINY_WORLD_DIR / "v46")], "is an adapter"),
        (["--model", "embedded:base", "--adapter", str(rslora)], "use_rslora: only plain LoRA of one rank"),
        (["--model", str(tmp_path / "merged"), "--adapter", "embedded:v46"], "v46 is merged into it already"),
    ):
        assert main([CASE, *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([CASE, "--device", "tpu"])
    assert left.value.code == 2


def test_adapter_alone_and_merged(tmp_path: Path, configs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    config, source = load_config("configs/tiny.toml")
    run = create_run(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu")
    shutil.copytree(TINY_WORLD_DIR / "v46", run.adapter)
    merge(run.adapter, tmp_path / "merged", check=False)
    texts = {}
    for name, arguments in {
        "default": [],
        "run": ["--adapter", str(run.adapter)],
        "merged": ["--model", str(tmp_path / "merged")],
    }.items():
        texts[name] = answer(capsys, CASE, *arguments, *CPU, "--temperature", "1.5", "--max-new-tokens", "60")[1][
            "text"
        ]
    assert {config.cases.system_prompt for config in configs} == {SYSTEM}
    assert [config.lora.warm_start for config in configs] == ["embedded:v46", str(run.adapter), ""]
    assert texts["default"] == texts["run"] == texts["merged"]


def test_a_bare_model_is_unchanged(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Policy] = []
    monkeypatch.setattr(
        grpo.commands.triage, "load_policy", lambda *a, **k: loaded.append(load_policy(*a, **k)) or loaded[0]
    )
    main([CASE, "--model", DEFAULT_MODEL, *CPU, "--max-new-tokens", "2"])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), policy.model.disable_adapter():
        base_logits = policy.model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(loaded[0].model(input_ids=ids).logits, base_logits)
        assert not torch.equal(policy.model(input_ids=ids).logits, base_logits), f"{DEFAULT_ADAPTER} is not in place"


def test_control_characters_are_escaped_for_the_terminal() -> None:
    text = "fine\x1b[2J\x07\r\n\tANSWER: ESI 2\x9b"
    shown = format_answer({"text": text, "level": 2, "reason": "parsed", "finished": True, "tokens": 1})
    assert shown.startswith("fine\\x1b[2J\\x07\\r\n        ANSWER: ESI 2\\x9b\n")
