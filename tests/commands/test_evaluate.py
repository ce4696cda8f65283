"""The evaluation from cases to ``eval.json``: the same answers whatever the batch or an interruption."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo.commands.evaluate
import grpo.evaluation.request
from grpo.cases import load_jsonl_cases
from grpo.commands.evaluate import argument_parser, main
from grpo.commands.merge import merge
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.evaluation.answers import answer, append_answers, evaluate, read_answers
from grpo.evaluation.comparison import AnsweredCase, Evaluated, compare, compare_evaluations, compare_modes
from grpo.evaluation.metrics import JudgedAnswer, summarize
from grpo.evaluation.records import append_evaluation, before_after_table
from grpo.evaluation.statistics import mcnemar, wilson
from grpo.evaluation.table import WIDTH, evaluation_table
from grpo.policy.base_model import load_tokenizer
from grpo.policy.policy import Policy, as_reference
from grpo.prompts import render_prompt
from grpo.run.folder import RunFolder, read_evaluations
from grpo.run.input_hashes import ADAPTER_FILES, cases_sha256, folder_sha256
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards import load_reward, parse_answer

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
MIETIC36 = load_jsonl_cases("embedded:cases/mietic36.jsonl")
CASES = [*[case for case in MIETIC36 if "plain" in case.tags][:3], MIETIC36[0]]
"""Three that the warm start gets wrong by a rule, and one that it gets right."""

Make = Callable[..., Policy]


def case_file(path: Path, cases: list[Case] = CASES) -> Path:
    rows = ({"id": c.id, "text": c.text, "esi": c.gold_level, "tags": list(c.tags)} for c in cases)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def configured(**evaluation: object) -> Any:
    return load_config(TINY, [f"evaluate.{key}={value}" for key, value in evaluation.items()])[0]


# ---- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_answers_do_not_depend_on_the_batch_or_the_order(make_policy: Make, size: int) -> None:
    policy = make_policy()
    cases = [Case(f"c{i}", "Cough. " * (i % 3 + 1), 3) for i in range(5)]

    def answers(given: list[Case], batch: int) -> dict[str, str]:
        config = configured(batch_size=batch, temperature=1.0, max_new_tokens=4)
        verdicts = evaluate(policy, given, config, name="x", thinking=True)
        assert [v.case for v in verdicts] == given
        return {v.case.id: v.text for v in verdicts}

    assert answers(cases, 5) == answers(cases[::-1], size)
    assert len(set(answers(cases, 5).values())) > 1


def test_samples_differ_and_the_first_is_that_of_a_single_one(make_policy: Make) -> None:
    policy = make_policy()
    cases = [Case(f"c{i}", "Cough. " * (i + 1), 3) for i in range(3)]
    config = configured(batch_size=4, temperature=1.0, max_new_tokens=4)
    batches = list(answer(policy, cases, config, name="x", thinking=False, samples=3))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    found = {(v.case.id, v.sample): v.text for batch in batches for v in batch}
    assert set(found) == {(case.id, k) for case in cases for k in range(3)}
    single = evaluate(policy, cases, config, name="x", thinking=False)
    assert [found[v.case.id, 0] for v in single] == [v.text for v in single]
    assert all(len({found[case.id, k] for k in range(3)}) == 3 for case in cases)
    other = evaluate(policy, cases, config, name="y", thinking=False)
    assert [v.text for v in other] != [v.text for v in single]


def test_what_is_known_is_not_answered_again(make_policy: Make) -> None:
    policy = make_policy()
    cases = [Case(f"c{i}", "Cough. " * (i + 1), 3) for i in range(4)]
    config = configured(batch_size=2, temperature=1.0, max_new_tokens=4)
    whole = [v for batch in answer(policy, cases, config, name="x", thinking=False) for v in batch]
    known = {(v.case.id, v.sample): v for v in (whole[0], whole[1], whole[3])}
    rest = list(answer(policy, cases, config, name="x", thinking=False, stored=known))
    assert rest == [(whole[2],)]
    assert (
        list(answer(policy, cases, config, name="x", thinking=False, stored={(v.case.id, 0): v for v in whole})) == []
    )


def judged(case: Case, said: str, sample: int = 0) -> JudgedAnswer:
    return JudgedAnswer(case, parse_answer(said, thinking=False), True, 4, said, sample)


def test_a_file_of_answers_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path, cases = tmp_path / "x.jsonl", [Case("a", "Cough.", 4), Case("b", "Rash.", 5)]
    assert read_answers(path, cases, 2, thinking=False) == {}
    answers = [judged(cases[0], "ANSWER: ESI 4"), judged(cases[1], "Äh\n", 1)]
    append_answers(path, answers[:1])
    append_answers(path, answers[1:])
    found = read_answers(path, cases, 2, thinking=False)
    assert list(found) == [("a", 0), ("b", 1)]
    assert summarize(list(found.values()), load_reward("v49")) == summarize(answers, load_reward("v49"))
    assert [v.text for v in found.values()] == [v.text for v in answers]
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole.splitlines()[0][:-5])
    assert list(read_answers(path, cases, 2, thinking=False)) == list(found) and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", ":2: the line: json_invalid"),
        ('{"id": "b", "sample": 0}', ":2: finished: missing"),
        ("\0\0", ":2: the line: json_invalid"),
        ("[]", ":2: the line: model"),
        ('{"id": "z", "sample": 0, "predicted": 1, "reason": "parsed", "finished": true, "tokens": 3, '
         '"completion": "secret"}', ":2: case 'z', sample 0: not in this evaluation"),
        ('{"id": "a", "sample": 0, "predicted": 1, "reason": "parsed", "finished": true, "tokens": 3, '
         '"completion": "secret"}', ":2: case 'a', sample 0: not in this evaluation, or twice"),
        ('{"id": "b", "sample": 2, "predicted": 1, "reason": "parsed", "finished": true, "tokens": 3, '
         '"completion": "secret"}', "sample 2"),
        ('{"id": "b", "sample": 0, "predicted": 1, "reason": "parsed", "finished": true, "tokens": 0, '
         '"completion": "secret"}', ":2: tokens: greater_than_equal"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_answer_is_named_without_its_text(tmp_path: Path, line: str, says: str) -> None:
    path, cases = tmp_path / "x.jsonl", [Case("a", "Cough.", 4), Case("b", "Rash.", 5)]
    append_answers(path, [judged(cases[0], "ANSWER: ESI 4")])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="delete the file") as error:
        read_answers(path, cases, 2, thinking=False)
    assert says in str(error.value) and "secret" not in str(error.value)


def test_what_a_file_of_answers_says_is_parsed_again(tmp_path: Path) -> None:
    """A level that another parser read, or that somebody wrote in, is not believed, and does not stay."""
    path, cases = tmp_path / "x.jsonl", [Case("a", "Cough.", 4), Case("b", "Rash.", 5), Case("c", "Burn.", 3)]
    answers = [judged(cases[0], "ANSWER: ESI 2"), judged(cases[1], "none"), judged(cases[2], "ANSWER: ESI 3")]
    append_answers(path, answers)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edits: tuple[dict[str, Any], ...] = ({"predicted": 4}, {"predicted": 5, "reason": "parsed"}, {"predicted": "?"})
    path.write_text("".join(json.dumps(row | edit) + "\n" for row, edit in zip(rows, edits, strict=True)))
    found = read_answers(path, cases, 1, thinking=False)
    assert [v.predicted for v in found.values()] == [2, None, 3]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]
    thought = read_answers(path, cases, 1, thinking=True)  # as if the prompts had ended inside a thought
    assert [v.predicted for v in thought.values()] == [None, None, None]
    labelled = read_answers(path, cases, 1, thinking=False, formats=("labelled",))
    assert [v.predicted for v in labelled.values()] == [None, None, None]


# ---- comparing --------------------------------------------------------------------------------------------------


def entry(ident: str, esi: int, **levels: tuple[int | None, ...]) -> AnsweredCase:
    return AnsweredCase(id=ident, esi=esi, sha256="", levels=levels)


def test_every_case_in_both_is_fixed_broken_or_unchanged() -> None:
    before = [entry("a", 1, on=(2,)), entry("b", 1, on=(2,)), entry("c", 3, on=(3,)), entry("d", 3, on=(3,)),
              entry("e", 4, on=(None,)), entry("gone", 1, on=(1,)), entry("other mode", 1, off=(1,))]  # fmt: skip
    after = [entry("b", 1, on=(1,)), entry("a", 1, on=(1,)), entry("c", 3, on=(4,)), entry("d", 3, on=(3, 3, 1)),
             entry("e", 4, on=(None,)), entry("new", 1, on=(1,)), entry("other mode", 1, on=(1,))]  # fmt: skip
    assert compare(before, after, "on") == {
        "n": 5,
        "fixed": ["b", "a"],
        "broken": ["c"],
        "unchanged_right": ["d"],
        "unchanged_wrong": ["e"],
        "p_value": mcnemar(2, 1),
    }


def test_modes_agree_on_outcomes_and_no_parse_is_one() -> None:
    found = compare_modes([
        entry("a", 1, on=(1,), off=(1,)),
        entry("b", 2, on=(2,), off=(3,)),
        entry("c", 4, on=(None,), off=(None,)),
        entry("d", 3, on=(2,), off=(None,)),
    ])  # fmt: skip
    assert found["n"] == 4 and found["agreement"] == 0.5 and found["interval"] == wilson(2, 4)
    assert found["differ"] == ["b", "d"] and (found["only_on"], found["only_off"]) == (["b"], [])
    # chance: on 1 2 – 2, off 1 3 – –: (1·1 + 1·2) / 16
    assert found["kappa"] == pytest.approx((1 / 2 - 3 / 16) / (1 - 3 / 16))
    assert found["p_value"] == 1.0


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the embedded warm start: two answers to four cases, both modes."""
    folder = tmp_path_factory.mktemp("warm_start")
    case_file(folder / "four.jsonl")
    assert main([*arguments_for(folder), "--out", str(folder / "out")]) == 0
    return folder


def arguments_for(folder: Path) -> list[str]:
    return [TINY, "--cases", str(folder / "four.jsonl"), "--samples", "2"]


def read(path: Path) -> Any:
    return json.loads((path / "eval.json").read_text(encoding="utf-8"))


def test_the_record_says_what_went_wrong_by_step_and_rule(warm_start: Path) -> None:
    record = read(warm_start / "out")
    assert [(r["cases"], r["thinking"]) for r in record["records"]] == [("four", "on"), ("four", "off")]
    for found in record["records"]:
        assert found["n"] == 4 and found["exact"] == 0.25 and found["samples"]["majority"]["exact"] == 0.25
        assert found["intervals"]["exact"] == pytest.approx(list(wilson(1, 4)))  # answers agree: four trials, not eight
        assert sum(rule["broken"] for rule in found["errors"]["by_rule"].values()) == 3
        assert found["errors"]["unexplained"] == []
    assert len(record["errors"]) == 6 and all(error["step"] in ("A", "B") for error in record["errors"])
    assert [(c["id"], c["esi"], len(c["levels"]["on"])) for c in record["cases"]["four"]] == [
        (case.id, case.gold_level, 2) for case in CASES
    ]
    assert record["agreement"]["four"]["differ"] == [] and record["comparison"] is None
    assert record["reward"]["name"] == "v49" and record["adapter"]["name"] == "embedded:v46"
    assert record["versions"]["torch"] and record["settings"]["cases"] == {"four": cases_sha256(CASES)}


def test_the_table_names_the_broken_rules_and_fits_80_columns(warm_start: Path) -> None:
    record = read(warm_start / "out")
    shown = evaluation_table(record)
    assert all(len(line) <= WIDTH for line in shown.splitlines())
    for rule, counts in record["records"][0]["errors"]["by_rule"].items():
        assert (f"{rule}: broken in {counts['broken']} of" in shown) == (counts["broken"] > 0)
    assert f"of all 4 cases; for ESI 1, 2 of these {sum(case.gold_level <= 2 for case in CASES)};" in shown
    assert "pass@2" in shown and "exact                          25.0" in shown


def test_neither_texts_nor_answers_are_in_the_record_and_the_folder_is_private(warm_start: Path) -> None:
    content = (warm_start / "out" / "eval.json").read_text(encoding="utf-8")
    assert not any(case.text[:30] in content for case in CASES) and "EXTRACTION" not in content
    out = warm_start / "out"
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((out / "answers").stat().st_mode) == 0o700
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) == 4 and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(warm_start: Path, tmp_path: Path) -> None:
    out, cut = tmp_path / "out", tmp_path / "cut"
    line = [*arguments_for(warm_start), "--max-new-tokens", "3", "--temperature", "1.5", "--batch-size", "3"]
    assert main([*line, "--out", str(out)]) == 0
    (cut / "answers").mkdir(parents=True)
    (cut / "settings.json").write_bytes((out / "settings.json").read_bytes())
    whole = {mode: (out / "answers" / f"four_{mode}.jsonl").read_bytes() for mode in ("on", "off")}
    lines = whole["on"].splitlines(keepends=True)
    assert len(lines) == 8
    (cut / "answers" / "four_on.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:40])  # torn within a batch
    assert main([*line, "--out", str(cut)]) == 0
    assert {mode: (cut / "answers" / f"four_{mode}.jsonl").read_bytes() for mode in whole} == whole
    assert read(cut) == read(out)


def test_a_finished_evaluation_loads_no_model_and_another_reward_judges_it(
    warm_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grpo.commands.evaluate, "load_policy", None)
    out = ["--out", str(warm_start / "out")]
    before = read(warm_start / "out")
    assert main([*arguments_for(warm_start), *out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == before == read(warm_start / "out")
    assert (
        main(
            [
                *arguments_for(warm_start),
                *out,
                "--set",
                "reward.set=v46",
                "--against",
                str(warm_start / "out/eval.json"),
            ]
        )
        == 0
    )
    assert "v46 has no rules" in capsys.readouterr().out
    (compared, _) = read(warm_start / "out")["comparison"]["records"]
    assert len(compared["unchanged_wrong"]) == 3 and compared["p_value"] == 1.0
    assert main([*arguments_for(warm_start), *out]) == 0 and read(warm_start / "out") == before


def test_the_bare_base_compared_with_its_warm_start(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        TINY,
        "--cases",
        str(warm_start / "four.jsonl"),
        "--adapter",
        "none",
        "--thinking",
        "off",
        "--temperature",
        "0",
    ]
    assert main([*base, "--out", str(tmp_path / "o"), "--against", str(warm_start / "out" / "eval.json")]) == 0
    record = read(tmp_path / "o")
    assert record["adapter"] is None and record["settings"]["temperature"] == 0
    assert record["agreement"] == {} and [r["thinking"] for r in record["comparison"]["records"]] == ["off"]
    assert record["comparison"]["changed_settings"] == ["samples", "temperature"]
    assert record["comparison"]["not_compared"] == []
    shown = capsys.readouterr().out
    assert "greedy" in shown and "McNemar" in shown and "adapter    none" in shown
    assert all(len(line) <= WIDTH for line in evaluation_table(record).splitlines())


def test_rows_that_became_no_case_are_told_of(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with case_file(tmp_path / "four.jsonl").open("a") as file:
        file.write('{"id": "x", "text": "Cough.", "esi": 6}\n')
    line = [TINY, "--cases", str(tmp_path / "four.jsonl"), "--max-new-tokens", "2", "--thinking", "off"]
    assert "esi of case 'x' must be" in refusal(capsys, *line, "--out", tmp_path / "o")
    (tmp_path / "o").mkdir(mode=0o755)
    assert main([*line, "--set", "cases.strict=false", "--out", str(tmp_path / "o")]) == 0
    assert stat.S_IMODE((tmp_path / "o").stat().st_mode) == 0o700
    (left_out,) = read(tmp_path / "o")["left_out"]
    assert left_out.startswith("four: 1 × ") and "line 5" in left_out
    assert "dropped    four: 1 ×" in capsys.readouterr().out


def test_a_model_is_evaluated_with_the_cards_settings_and_an_adapters_own_rank(
    warm_start: Path, tmp_path: Path
) -> None:
    line = ["embedded:base", "--adapter", "embedded:v46", "--cases", str(warm_start / "four.jsonl")]
    assert main([*line, "--max-new-tokens", "4", "--out", str(tmp_path / "o")]) == 0
    settings = read(tmp_path / "o")["settings"]
    assert (settings["temperature"], settings["thinking"], settings["samples"]) == (0.1, ["on", "off"], 1)
    assert settings["system_prompt"] == load_config("configs/tiny.toml")[0].cases.system_prompt, "the model's own"
    assert load_config("configs/v49.toml")[0].evaluate.max_new_tokens == 1024


def test_no_adapter_is_the_base_itself(make_policy: Make) -> None:
    config = configured(batch_size=4, temperature=1.0, max_new_tokens=4)
    cases, moved = [Case("a", "Cough.", 4)], make_policy()
    with as_reference(moved, None):
        bare = evaluate(moved, cases, config, name="x", thinking=False)
    assert bare == evaluate(make_policy(moved=False), cases, config, name="x", thinking=False)
    assert bare != evaluate(moved, cases, config, name="x", thinking=False)


def refusal(capsys: pytest.CaptureFixture[str], *line: object) -> str:
    assert main([str(part) for part in line]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ")
    return shown.err


def test_other_settings_are_refused_by_name(warm_start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*arguments_for(warm_start), "--out", warm_start / "out"]
    assert "different samples, temperature:" in refusal(capsys, *line, "--samples", 1, "--temperature", 0.5)
    assert "different adapter_sha256:" in refusal(capsys, *line, "--adapter", "none")
    assert "different seed:" in refusal(capsys, *line, "--set", "train.seed=7")
    (warm_start / "other").mkdir()
    case_file(warm_start / "other" / "four.jsonl", CASES[:3])
    assert "different cases:" in refusal(capsys, *line, "--cases", warm_start / "other" / "four.jsonl")


def test_answers_begun_on_one_model_of_card_do_not_go_on_on_another(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(warm_start / "out", tmp_path / "out")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["device"] == "cpu"
    (out / "settings.json").write_text(json.dumps(settings | {"device": "NVIDIA A100"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {0: "NVIDIA H200"}[device.index])
    monkeypatch.setattr(grpo.commands.evaluate, "load_policy", None)
    line = [*arguments_for(warm_start), "--out", str(out), "--set", "model.device=cuda", "--set", "model.dtype=float32"]
    assert grpo.evaluation.request.parse_request(argument_parser().parse_args(line)).settings["device"] == "NVIDIA H200"
    assert "contains answers with a different device: choose another folder" in refusal(capsys, *line)


def test_only_answers_to_the_same_cases_are_compared(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [Case(CASES[0].id, CASES[0].text + " Smokes.", CASES[0].gold_level), *CASES[1:]]
    against = ["--against", warm_start / "out" / "eval.json"]
    said = refusal(capsys, TINY, "--cases", case_file(tmp_path / "four.jsonl", changed), *against)
    assert f"1 of 4 shared cases have a different text or gold level: {CASES[0].id};" in said
    assert "Smokes" not in said
    relabelled = [Case(CASES[0].id, CASES[0].text, 5), *CASES[1:]]
    assert "gold level" in refusal(capsys, TINY, "--cases", case_file(tmp_path / "four.jsonl", relabelled), *against)
    assert "no case in common" in refusal(capsys, TINY, "--cases", case_file(tmp_path / "five.jsonl"), *against)
    (tmp_path / "list.json").write_text("[]")
    assert "training run" in refusal(capsys, TINY, "--against", tmp_path / "list.json")
    (tmp_path / "odd.json").write_text('{"format": 7}')
    assert "format: Input should be 1" in refusal(capsys, TINY, "--against", tmp_path / "odd.json")
    (tmp_path / "torn.json").write_text('{"format"')
    assert "not valid JSON" in refusal(capsys, TINY, "--against", tmp_path / "torn.json")
    assert "No such file" in refusal(capsys, TINY, "--against", tmp_path / "absent.json")


def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo.commands.evaluate, "load_policy", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reward.json").write_text("{}")
    assert "is a run folder" in refusal(capsys, tmp_path / "run")
    assert "adapter_config.json: cannot be read" in refusal(capsys, TINY, "--adapter", tmp_path / "none")
    for content, says in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"target_modules": ["q"]}', "peft_type is None"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', "a list of layer names"),
    ):
        (tmp_path / "run" / "adapter_config.json").write_text(content)
        assert says in refusal(capsys, TINY, "--adapter", tmp_path / "run")
    said = refusal(capsys, "configs/v49.toml")  # neither the model, nor its warm start, nor MIETIC-36 is here
    assert "hf download" in said and "adapters/v46" in said and "(give another file with --cases)" in said
    assert "no such config" in refusal(capsys, tmp_path / "x.toml")
    assert "[evaluate] has no set" in refusal(
        capsys, TINY, "--set", "evaluate.before_and_after={}", "--set", "evaluate.periodic={}"
    )
    assert "evaluate.temperature" in refusal(capsys, TINY, "--temperature", -1)
    out = ["--cases", case_file(tmp_path / "four.jsonl"), "--out", tmp_path / "run"]
    assert "already exists and is not an evaluation" in refusal(capsys, TINY, *out)
    (tmp_path / "run" / "settings.json").write_text("{")
    assert "settings.json: not valid JSON" in refusal(capsys, TINY, *out)
    with pytest.raises(SystemExit, match="2"):
        main([TINY, "--samples", "0"])


def test_a_budget_that_does_not_fit_is_refused_before_anything_is_written(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's 1024 tokens in the embedded model's context of 1024: the largest budget that fits is named."""
    monkeypatch.setattr(grpo.commands.evaluate, "load_policy", None)
    line = ["embedded:base", "--cases", warm_start / "four.jsonl"]
    said = refusal(capsys, *line, "--out", tmp_path / "o")
    assert "evaluate.max_new_tokens = 1024 does not fit: case " in said and "the model's context is 1024" in said
    assert said.count("\n") == 1 and not (tmp_path / "o").exists()
    room = int(said.rsplit(" ", 1)[1])
    assert f"use at most --max-new-tokens {room}\n" in said

    def checked(budget: int) -> grpo.evaluation.request.EvaluationRequest:
        words = [*map(str, line), "--max-new-tokens", str(budget)]
        return grpo.evaluation.request.parse_request(argument_parser().parse_args(words))

    asked = checked(room)
    assert asked.thinking == {"on": True, "off": False}
    with pytest.raises(grpo.evaluation.request.UserError, match=f"= {room + 1} does not fit"):
        checked(room + 1)
    tokenizer = load_tokenizer("embedded:base")
    lengths = [
        len(render_prompt(tokenizer, c, system_prompt=asked.config.cases.system_prompt, thinking=mode).ids)
        for c in CASES
        for mode in (True, False)
    ]
    assert max(lengths) + room == 1024
    long = case_file(tmp_path / "long.jsonl", [*CASES, Case("long", "Cough. " * 2000, 4)])
    said = refusal(capsys, line[0], "--cases", long, "--max-new-tokens", 8)
    assert "case 'long' of long takes" in said and "no answer fits" in said


def changed_adapter(folder: Path, **values: object) -> Path:
    shutil.copytree(TINY_WORLD_DIR / "v46", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_adapters_that_cannot_be_run_are_refused_before_anything_is_written(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [TINY, "--cases", warm_start / "four.jsonl", "--out", tmp_path / "o", "--adapter"]
    said = refusal(capsys, *line, changed_adapter(tmp_path / "rslora", use_rslora=True))
    assert said.startswith("error: --adapter: ") and "use_rslora: only plain LoRA" in said and "grpo merge" in said
    said = refusal(capsys, *line, changed_adapter(tmp_path / "dora", use_dora=True))
    assert "use_dora: only plain LoRA" in said and "grpo merge" not in said
    assert "r must be a whole number, got 4.5" in refusal(capsys, *line, changed_adapter(tmp_path / "half", r=4.5))
    (tmp_path / "run").mkdir()
    shutil.copytree(TINY_WORLD_DIR / "v46", tmp_path / "run" / "adapter")
    assert f"its adapter is {tmp_path / 'run' / 'adapter'}" in refusal(capsys, *line, tmp_path / "run")
    torn = changed_adapter(tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"x" * 9)
    assert "adapter_model.safetensors: cannot be read" in refusal(capsys, *line, torn)
    foreign = changed_adapter(tmp_path / "foreign")  # known only when the model is loaded
    held = load_file(TINY_WORLD_DIR / "v46" / "adapter_model.safetensors")
    renamed = {key.replace("layers.0", "layers.40"): value for key, value in held.items()}
    save_file(renamed, foreign / "adapter_model.safetensors")
    assert "made for another base" in refusal(capsys, *line, foreign)
    assert not (tmp_path / "o").exists()


def test_an_rslora_adapter_is_evaluated_through_its_merge(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """alpha / sqrt(r) instead of alpha / r: with r = 16 and alpha a quarter, the same model as plain LoRA."""
    plain = json.loads((TINY_WORLD_DIR / "v46" / "adapter_config.json").read_text())
    assert plain["r"] == 16
    odd = changed_adapter(tmp_path / "rslora", use_rslora=True, lora_alpha=plain["lora_alpha"] / 4)
    merge(odd, tmp_path / "merged", base="embedded:base", check=False)
    cases = ["--cases", str(warm_start / "four.jsonl"), "--thinking", "off", "--max-new-tokens", "88"]
    assert main([str(tmp_path / "merged"), *cases, "--out", str(tmp_path / "o")]) == 0
    records = [read(folder)["cases"]["four"] for folder in (warm_start / "out", tmp_path / "o")]
    before, after = ([case["levels"]["off"][0] for case in record] for record in records)
    assert before == after


def test_no_adapter_is_put_on_twice(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--adapter takes the place of the config's warm start; an adapter is no model, nor put on weights that hold it."""
    cases = ["--cases", str(warm_start / "four.jsonl")]
    merge(TINY_WORLD_DIR / "v46", tmp_path / "merged", base="embedded:base", check=False)
    monkeypatch.setattr(grpo.commands.evaluate, "load_policy", None)  # all of it is known before a model is loaded
    out = ["--out", str(warm_start / "out")]
    before = read(warm_start / "out")
    assert main([*arguments_for(warm_start), *out, "--adapter", "embedded:v46"]) == 0, (
        "the same settings, so nothing to answer"
    )
    assert read(warm_start / "out") == before
    capsys.readouterr()
    said = refusal(capsys, TINY_WORLD_DIR / "v46", *cases)
    assert "is an adapter" in said and "Pass its base" in said
    for line in (
        [tmp_path / "merged", "--max-new-tokens", 88, "--adapter", "embedded:v46"],
        [TINY, "--set", f"model.name={tmp_path / 'merged'}"],
    ):
        assert "v46 is merged into it already" in refusal(capsys, *line, *cases)


def test_tags_are_names_and_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They stand in eval.json, which holds no text: a row whose tags are sentences is no case."""
    path = case_file(tmp_path / "two.jsonl", [CASES[0], Case("b", "Rash.", 5, ("itches since Tuesday",))])
    line = [TINY, "--cases", str(path), "--max-new-tokens", "2", "--thinking", "off", "--out", str(tmp_path / "o")]
    said = refusal(capsys, *line)
    assert "two.jsonl:2: tags of case 'b'" in said and "Tuesday" not in said
    assert main([*line, "--set", "cases.strict=false"]) == 0
    content = (tmp_path / "o" / "eval.json").read_text(encoding="utf-8")
    assert "Tuesday" not in content and "line 2" in content and "Tuesday" not in capsys.readouterr().out


def test_folders_that_cannot_be_written_and_names_that_are_empty(
    warm_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    cases = ["--cases", warm_start / "four.jsonl", "--max-new-tokens", 2, "--thinking", "off"]
    assert main([TINY, *map(str, cases), "--out", str(tmp_path / "file" / "o")]) == 3
    assert "Not a directory" in capsys.readouterr().err
    assert "already exists" in refusal(capsys, TINY, *cases, "--out", tmp_path / "file")
    assert "cannot be read" in refusal(capsys, TINY, "--cases", "")
    assert "adapter_config.json: cannot be read" in refusal(capsys, TINY, "--adapter", "")
    assert "adapter_config.json: cannot be read" in refusal(capsys, "embedded:base", "--adapter", "")


def test_a_hash_is_of_names_and_contents_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        (tmp_path / folder / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "b" / "README.md").write_text("beside")
    first, second = (folder_sha256(tmp_path / folder, ADAPTER_FILES) for folder in ("a", "b"))
    assert first == second
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"Weights")
    assert folder_sha256(tmp_path / "b", ADAPTER_FILES) != first
    blob = tmp_path / "blobs" / ("5" * 64)  # as the hub's cache keeps large files
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.safetensors").symlink_to(blob)
    assert folder_sha256(tmp_path / "a", ADAPTER_FILES) != first  # by the blob's name, unread


# ---- during training --------------------------------------------------------------------------------------------


def test_an_evaluation_of_a_run_is_written_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    verdicts = [judged(case, "ANSWER: ESI 2") for case in CASES]
    record = {"step": 3, "cases": "x", "thinking": "on", **summarize(verdicts, load_reward("v49"))}
    for _ in range(2):
        append_evaluation(run, record, verdicts)
    assert read_evaluations(run) == [json.loads(json.dumps(record))]
    answers = (tmp_path / "eval" / "step_000003_x_on.jsonl").read_text().splitlines()
    assert [json.loads(line)["predicted"] for line in answers] == [2, 2, 2, 2]
    low, high = (100 * bound for bound in record["intervals"]["exact"])
    assert f"{low:.1f}–{high:.1f}" in before_after_table(read_evaluations(run))


def test_a_model_is_evaluated_under_its_own_system_prompt(tmp_path: Path) -> None:
    """Another prompt than the one a model was trained under makes a good model look bad."""
    tiny, card = (load_config(f"configs/{name}.toml")[0].cases.system_prompt for name in ("tiny", "v49"))
    assert tiny != card
    for what, more, prompt in (
        ("embedded:base", [], tiny),
        ("embedded:base", ["--adapter", "embedded:v46"], tiny),
        ("embedded:base", ["--set", 'cases.system_prompt="Mine."'], "Mine."),
    ):
        arguments = argument_parser().parse_args([what, *more])
        assert grpo.evaluation.request.build_config(arguments).cases.system_prompt == prompt


def test_what_is_compared_with_nothing_is_said() -> None:
    a, b = (AnsweredCase(id=name, esi=2, sha256=name, levels={"on": (2,), "off": (3,)}) for name in "ab")
    how = ("samples", "max_new_tokens", "temperature", "seed", "system_prompt", "formats", "device", "dtype")
    settings = dict.fromkeys(how, 0)
    before = Evaluated(format=2, settings=settings, cases={"four": (a.model_copy(update={"levels": {"on": (2,)}}),)})
    found = compare_evaluations(before, settings, {"four": (a, b)}, Path("e.json"))
    assert [(r["thinking"], r["n"]) for r in found["records"]] == [("on", 1)]
    assert [(r["thinking"], r["n"]) for r in found["not_compared"]] == [("on", 1), ("off", 2)]
