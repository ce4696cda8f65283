"""The run folder: one process at a time, nothing outside it, private, and cut back to what a checkpoint holds."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.commands.inspect import main as inspect
from grpo.commands.replay import main as replay
from grpo.commands.report import main as report
from grpo.config import Config, ConfigSource, load_config
from grpo.evaluation.records import append_evaluation
from grpo.inspection.run_reader import read_header
from grpo.run.checkpoint import Progress
from grpo.run.folder import (
    RunFolder,
    append_metrics,
    check_folder,
    exclusive_lock,
    has_started,
    read_evaluations,
    rewind_run,
)
from grpo.run.folder import create_run as start
from grpo.runtime.errors import UserError
from rewards import load_reward
from tests.support.recorded_runs import recorded

TINY = "configs/tiny.toml"
RATES = {"n": 0, "exact": 0.5, "adjacent": 0.5, "dangerous_under": 0.0, "no_parse": 0.0, "clipped_ratio": 0.0,
         "intervals": {"exact": [0.1, 0.9]}}  # fmt: skip
INPUTS = {"cases.train": "a" * 64, "reward.set": "b" * 64}


@pytest.fixture(scope="module")
def made() -> tuple[Config, ConfigSource]:
    return load_config(TINY, [])


@pytest.fixture
def run(made: tuple[Config, ConfigSource], tmp_path: Path) -> RunFolder:
    config, source = made
    return start(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu", inputs=INPUTS)


def test_a_second_run_in_the_folder_is_refused_and_told_by_whom(run: RunFolder) -> None:
    with exclusive_lock(run.path):
        held = subprocess.run(
            [sys.executable, "-c", "import sys, pathlib, grpo.run.folder as r\n"
             "try:\n  r.exclusive_lock(pathlib.Path(sys.argv[1])).__enter__()\n"
             "except r.UserError as e: print(e)", run.path],
            capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
        assert f"in use by process {os.getpid()} on " in held.stdout
        with pytest.raises(UserError, match="in use by"), exclusive_lock(run.path):
            pass
    with exclusive_lock(run.path):
        pass  # the file of before blocks nobody
    (run.path / ".lock").write_text("process 1 on another machine\n")
    with exclusive_lock(run.path):
        assert (run.path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_is_going_on_can_be_read(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded(tmp_path_factory.getbasetemp(), "plain"), run)
    shutil.rmtree(run / "adapter")
    with exclusive_lock(run):
        assert replay([str(run)]) == 0
        assert inspect([str(run), "--step", "2"]) == 0
        assert report([str(run), "--out", str(tmp_path / "report.html")]) == 0


def test_a_run_killed_before_it_began_is_begun(
    made: tuple[Config, ConfigSource], run: RunFolder, tmp_path: Path
) -> None:
    config, source = made
    for leaves in ((), ("reward.json",), ("reward.json", ".config.json.partial")):
        folder = tmp_path / "".join(leaves) / "x"
        with exclusive_lock(folder):
            for name in leaves:
                (folder / name).write_text("{")
            assert not has_started(folder)
            check_folder(folder, config, resume=False)
            check_folder(folder, config, resume=True)
            start(folder, config, source, load_reward(config.reward.set), device="cpu")
            assert has_started(folder) and json.loads((folder / "reward.json").read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for resume, says in ((False, "already exists"), (True, "no run to resume here")):
        with pytest.raises(UserError, match=says):
            check_folder(tmp_path / "mine", config, resume=resume)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


@pytest.mark.parametrize("value", [False, True])
def test_a_recorded_model_shard_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, value: bool
) -> None:
    path = tmp_path / "run"
    shutil.copytree(recorded(tmp_path_factory.getbasetemp(), "plain"), path)
    config = read_header(path).config
    record = json.loads((path / "config.json").read_text())
    record["config"]["model"]["shard"] = value
    (path / "config.json").write_text(json.dumps(record))
    assert read_header(path).config == config
    check_folder(path, config, resume=True)
    assert replay([str(path)]) == 0
    assert report([str(path), "--out", str(tmp_path / "report.html")]) == 0


def test_config_json_is_written_last(
    made: tuple[Config, ConfigSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source = made
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(Path(b).name), replace(a, b)))
    start(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu")
    assert written == ["reward.json", "config.json"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval", "checkpoints", "ledger", "checkpoints/step_000001", ".lock"])
def test_a_symlink_out_of_the_folder_is_refused(
    made: tuple[Config, ConfigSource], run: RunFolder, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name}: is a symlink"):
        check_folder(run.path, made[0], resume=True)
    assert not any(outside.iterdir())


@pytest.mark.parametrize("name", ["../x", "..", ".x", "a/b", "/etc/x", "a\\\\b", "a\\nb", "", "x" * 81])
def test_no_name_leads_out_of_the_folder_of_runs(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        load_config(TINY, [f'name="{name}"'])
    with pytest.raises(ValueError, match=r"evaluate\.before_and_after"):
        load_config(TINY, [f'evaluate.before_and_after={{"{name}" = "embedded:cases/test.jsonl"}}'])


def test_the_folder_is_its_owners_alone_whatever_it_was(made: tuple[Config, ConfigSource], tmp_path: Path) -> None:
    config, source = made
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    run = start(folder, config, source, load_reward(config.reward.set), device="cpu")
    append_metrics(run, {"step": 1})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    folder.chmod(0o755)
    rewind_run(folder, Progress(0), config)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_came_after_the_checkpoint_is_cut_off_and_half_written_files_too(
    made: tuple[Config, ConfigSource], run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        append_metrics(run, {"step": step, "loss": 0.5})
        append_evaluation(run, {"step": step, "cases": "t", "thinking": "on", **RATES}, [])
    before = (run.path / "eval.json").read_bytes(), run.metrics.read_bytes()
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 4, "lo\xff')
    (run.path / "eval" / ".step_000004_t_on.jsonl.partial").touch()
    (run.path / "eval" / "notes.txt").touch()
    config = made[0]
    rewind_run(
        run.path, Progress(3), config.model_copy(update={"ledger": config.ledger.model_copy(update={"every": 0})})
    )
    assert ((run.path / "eval.json").read_bytes(), run.metrics.read_bytes()) == before
    rewind_run(run.path, Progress(2), made[0])
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]
    assert [record["step"] for record in json.loads((run.path / "eval.json").read_text())] == [1, 2]
    assert sorted(os.listdir(run.path / "eval")) == ["notes.txt", "step_000001_t_on.jsonl", "step_000002_t_on.jsonl"]


def test_a_resume_with_other_contents_is_refused(made: tuple[Config, ConfigSource], run: RunFolder) -> None:
    rewind_run(run.path, Progress(0), made[0], INPUTS)
    with pytest.raises(UserError, match=r"the file behind cases\.train has changed since the run started"):
        rewind_run(run.path, Progress(0), made[0], INPUTS | {"cases.train": "c" * 64})


@pytest.mark.parametrize("content", ["", "[", "[]", "null", "\xff", "[" * 100_000])
def test_a_broken_config_json_is_one_error(made: tuple[Config, ConfigSource], run: RunFolder, content: str) -> None:
    (run.path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json: not |a different config"):
        check_folder(run.path, made[0], resume=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", '{"inputs": [1]}', "config.json: inputs: expected"),
        ("config.json", '{"inputs": "x"}', "config.json: inputs: expected"),
        ("eval.json", "{}", "eval.json: not the evaluations of a run: the file: "),
        ("eval.json", "[7]", "0: "),
        ("eval.json", '[{"step": "x", "cases": "a", "thinking": "on"}]', "0.step: "),
        ("eval.json", '[{"step": true, "cases": "a", "thinking": "on"}]', "0.step: "),
        ("eval.json", '[{"step": 0, "cases": "a", "thinking": "on"}]', "0.n: "),
        (
            "eval.json",
            json.dumps([{"step": 0, "cases": "a", "thinking": "on", **RATES, "exact": None}]),
            "0.exact: ",
        ),
        ("eval.json", json.dumps([{"step": 0, "cases": "a", "thinking": "on", **RATES, "intervals": 7}]), "intervals"),
        ("eval.json", None, "eval.json: cannot be read: expected a file, found a folder"),
        ("metrics.jsonl", None, "metrics.jsonl: cannot be read: expected a file, found a folder"),
        ("metrics.jsonl", "x" * (2 << 20), "metrics.jsonl: line 1: over 1,048,576 bytes"),
    ],
)
def test_records_of_anything_are_one_error_and_nothing_is_touched(
    made: tuple[Config, ConfigSource], run: RunFolder, name: str, content: str | None, says: str
) -> None:
    append_metrics(run, {"step": 1, "loss": 0.5})
    append_evaluation(run, {"step": 1, "cases": "t", "thinking": "on", **RATES}, [])
    path = run.path / name
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as told:
        rewind_run(run.path, Progress(0), made[0], INPUTS)
    assert says in str(told.value)
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def test_of_recorded_evaluations_each_kind_of_fault_is_named_and_no_value_quoted(run: RunFolder) -> None:
    right = {"step": 1, "cases": "t", "thinking": "on", **RATES, "more": {"secret": [None]}}
    run.evaluations.write_text(json.dumps([right, {k: v for k, v in right.items() if k != "intervals"}]))
    assert read_evaluations(run)[0] == right, "what is not checked is kept"
    odd: list[tuple[str, object]] = [
        ("cases", 7), ("thinking", None), ("thinking", ["secret" * 1000]), ("step", -1), ("step", 1.0), ("n", "secret"),
        ("n", True), ("exact", "0.5"), ("exact", True), ("adjacent", 1.1), ("no_parse", -0.1), ("clipped_ratio", {}),
        ("intervals", None), ("intervals", {}), ("intervals", {"exact": None}), ("intervals", {"exact": [0.1, 2]}),
        ("intervals", {"exact": ["secret"]}), ("dangerous_under", ["secret"]),
    ]  # fmt: skip
    for key, value in odd:
        run.evaluations.write_text(json.dumps([right, right | {key: value}, {"secret": value}]))
        with pytest.raises(UserError) as told:
            read_evaluations(run)
        message = str(told.value)
        assert message.startswith(f"{run.evaluations}: not the evaluations of a run: 1.{key}"), value
        assert "secret" not in message


@pytest.mark.parametrize(
    "line", ['{"step": 1e999}', '{"step": 99999999999999999999}', '{"step": null}', "[1]", "[" * 9000, "\xff"]
)
def test_a_line_of_metrics_that_says_no_step_is_cut_off(
    made: tuple[Config, ConfigSource], run: RunFolder, line: str
) -> None:
    append_metrics(run, {"step": 1, "loss": 0.5})
    before = run.metrics.read_bytes()
    with run.metrics.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    rewind_run(run.path, Progress(1), made[0], INPUTS)
    assert run.metrics.read_bytes() == before
