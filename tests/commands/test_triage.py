"""One case, one answer: the command line from the case to the exit code."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.commands.merge import merge
from grpo.commands.triage import DEFAULT_ADAPTER, DEFAULT_MODEL, NOTICE, Triage, load_speaker, main, show, triage
from grpo.config import EMBEDDED, load_config
from grpo.policy.adapter_files import system_prompt
from grpo.policy.policy import Policy
from grpo.prompts import render_prompt
from grpo.rollout import rollout
from grpo.run.folder import start_run
from grpo.types import Case, Completion, Group, Prompt
from rewards import Answer, load_reward

CASE = (
    "14-year-old girl, bug bite. Brought in by EMS. Tongue swelling, muffled voice and stridor. "
    "On arrival RR 17, HR 140, BP 158/102, O2 sat 95%. Treated for eczema."
)
SYSTEM = "Extract clinical fields, apply the ESI algorithm, then state the ESI level."


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_speaker(None, None, device="cpu", dtype="float32")[0]


@pytest.fixture
def quick(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The command without loading a model each time; what it would have loaded."""
    asked: list[tuple[object, ...]] = []

    def loaded(model: str | None, adapter: str | None, *, device: str, dtype: str) -> tuple[Policy, str]:
        asked.append((model, adapter, device, dtype))
        return policy, SYSTEM

    monkeypatch.setattr("grpo.commands.triage.load_speaker", loaded)
    return asked


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_it_works_out_of_the_box(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CASE, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "EXTRACTION:\nChief complaint: " in said and "\nlevel     ESI 1\n" in said
    assert said.endswith(f"notice    {NOTICE}\n") and said.count("not approved for clinical use") == 1


def test_the_answer_is_a_function_of_case_mode_and_seed(
    quick: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ("--temperature", "1.5", "--max-new-tokens", "30")
    first = answer(capsys, CASE, *hot, "--seed", "1")
    assert first == answer(capsys, CASE, *hot, "--seed", "1")
    assert first[1]["text"] != answer(capsys, CASE, *hot, "--seed", "2")[1]["text"]
    code, off = answer(capsys, CASE, "--thinking", "off")
    assert (code, off["thinking"], off["level"], off["reason"], off["finished"]) == (0, False, 1, "parsed", True)
    assert str(off["text"]).startswith("EXTRACTION:") and off["notice"] == NOTICE
    assert quick == [(None, None, "auto", "auto")] * 4


def test_no_level_is_said_and_is_exit_code_1(quick: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    code, cut = answer(capsys, CASE, "--max-new-tokens", "5")
    assert (code, cut["level"], cut["reason"], cut["finished"]) == (1, None, "unclosed thinking", False)
    assert cut["tokens"] == 5
    assert main([CASE, "--max-new-tokens", "5"]) == 1
    assert "level     none: unclosed thinking (cut off after 5 tokens)" in capsys.readouterr().out


def test_the_budget_is_the_cards_or_what_the_context_leaves(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def spy(policy: Policy, prompts: list[Prompt], keys: list[list[int]], **values: Any) -> tuple[Group, ...]:
        asked.append((len(prompts[0].ids), values["max_new_tokens"]))
        return rollout(policy, prompts, keys, **values | {"max_new_tokens": 1})

    monkeypatch.setattr("grpo.commands.triage.rollout", spy)
    options = {"system": SYSTEM, "thinking": True, "temperature": 0.0, "seed": 0}
    triage(policy, "Xq " * 300, **options)
    triage(policy, CASE, max_new_tokens=7, **options)
    triage(dataclasses.replace(policy, context=10_000), CASE, **options)
    assert asked[0][0] + asked[0][1] == policy.context == 1024 and asked[0][1] < 700
    assert [budget for _, budget in asked[1:]] == [7, 1024]


class Pipe:
    """Standard input that is no terminal, unless it says so."""

    def __init__(self, raw: bytes, terminal: bool = False) -> None:
        self.buffer, self.isatty = io.BytesIO(raw), lambda: terminal


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_the_case_may_come_through_a_pipe(
    arguments: list[str],
    quick: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[str] = []

    def spy(tokenizer: Any, case: Case, **values: Any) -> Prompt:
        read.append(case.text)
        return render_prompt(tokenizer, case, **values)

    monkeypatch.setattr("grpo.commands.triage.render_prompt", spy)
    for raw in (CASE.encode(), b"\xef\xbb\xbf" + CASE.encode() + b"\r\n"):
        monkeypatch.setattr("sys.stdin", Pipe(raw))
        assert answer(capsys, *arguments, "--max-new-tokens", "2")[0] == 1
    assert read == [CASE, CASE]


BAD: dict[str, tuple[list[str], bytes, str]] = {
    "nothing": ([], b"", "no case: give it as one argument"),
    "blanks": (["  \n"], b"", "no case"),
    "an empty pipe": (["-"], b" ", "no case"),
    "not UTF-8": (["-"], b"secret \xff", "standard input: not UTF-8 (byte 7)"),
    "a NUL": (["secret \0"], b"", "not UTF-8 text: it holds a NUL"),
    "half a character": (["secret \udcff"], b"", "bytes that are no characters"),
    "too long": (["secret" * 20_000], b"", "the case has 120,000 characters, at most 100,000"),
    "a flood": (["-"], b"secret" * 100_000, "more than 100,000 characters"),
    "more than the context": (["secret " * 2000], b"", "do not fit the model's context of 1024"),
    "a budget of none": (["secret", "--max-new-tokens", "0"], b"", "--max-new-tokens 0: expected at least 1"),
    "too great a budget": (["secret", "--max-new-tokens", "1020"], b"", "do not fit the model's context"),
    "below zero": (["secret", "--temperature", "-1"], b"", "--temperature -1.0: expected 0, or a number of at"),
    "too near zero": (["secret", "--temperature", "1e-45"], b"", "expected 0, or a number of at least 1e-06"),
    "no number": (["secret", "--temperature", "nan"], b"", "--temperature nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_without_the_case(
    name: str, quick: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, piped, message = BAD[name]
    monkeypatch.setattr("sys.stdin", Pipe(piped, terminal=name == "nothing"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err and "secret" not in said.err


def test_models_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rslora = tmp_path / "rslora"
    shutil.copytree(EMBEDDED / "v46", rslora)
    found = json.loads((rslora / "adapter_config.json").read_text())
    (rslora / "adapter_config.json").write_text(json.dumps(found | {"use_rslora": True}))
    merge(EMBEDDED / "v46", tmp_path / "merged", base="embedded:base", check=False)
    for arguments, message in (
        (["--model", str(tmp_path / "none")], "no such folder"),
        (["--model", "Qwen/Qwen3.5-9B"], "hf download Qwen/Qwen3.5-9B"),
        (["--adapter", str(tmp_path / "none")], "adapter_config.json: cannot be read"),
        (["--adapter", ""], '--adapter "": expected a folder or a name'),
        (["--model", ""], '--model "": expected a folder or a name'),
        (["--model", str(EMBEDDED / "v46")], "holds an adapter"),
        (["--model", "embedded:base", "--adapter", str(rslora)], "use_rslora: only plain LoRA of one rank"),
        (["--model", str(tmp_path / "merged"), "--adapter", "embedded:v46"], "v46 is merged into it already"),
    ):
        assert main([CASE, *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([CASE, "--device", "tpu"])
    assert left.value.code == 2


def test_adapter_alone_merged_and_bare_base(tmp_path: Path) -> None:
    config, source = load_config("configs/tiny.toml")
    run = start_run(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu")
    shutil.copytree(EMBEDDED / "v46", run.adapter)
    merge(run.adapter, tmp_path / "merged", check=False)
    said = {}
    for name, (model, adapter) in {
        "default": (None, None),
        "run": (None, str(run.adapter)),
        "merged": (str(tmp_path / "merged"), None),
        "base": (DEFAULT_MODEL, None),
    }.items():
        policy, system = load_speaker(model, adapter, device="cpu", dtype="float32")
        assert system == SYSTEM == system_prompt(DEFAULT_MODEL, None)
        result = triage(policy, CASE, system=system, thinking=False, temperature=0.0, seed=0, max_new_tokens=40)
        said[name] = result.completion
    assert said["default"].ids == said["run"].ids == said["merged"].ids
    assert said["default"].sampler_logprobs == pytest.approx(said["merged"].sampler_logprobs, abs=1e-4)
    assert said["base"].sampler_logprobs != pytest.approx(said["merged"].sampler_logprobs, abs=1e-3)


def test_a_bare_model_speaks_as_it_is(policy: Policy) -> None:
    bare, _ = load_speaker(DEFAULT_MODEL, None, device="cpu", dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), policy.model.disable_adapter():
        wanted = policy.model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(bare.model(input_ids=ids).logits, wanted)
        assert not torch.equal(policy.model(input_ids=ids).logits, wanted), f"{DEFAULT_ADAPTER} is not in place"


def test_a_terminals_commands_are_not_passed_on() -> None:
    completion = Completion((1,), (0.0,), True, "fine\x1b[2J\x07\r\n\tANSWER: ESI 2\x9b")
    said = show(Triage(Answer(2, "parsed", (0, 1)), completion, False))
    assert said.startswith("fine\\x1b[2J\\x07\\r\n        ANSWER: ESI 2\\x9b\n")
