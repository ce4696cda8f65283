"""``grpo tensorboard``: every metric and evaluation rate of a run becomes a point with its step and wall time."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.commands.tensorboard import main, scalars
from grpo.inspection.run_reader import read_run
from tests.report.test_report import add_evaluations, evaluation, record_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with evaluations. Read it, never write to it."""
    folder = record_run(tmp_path_factory.mktemp("runs") / "run")
    add_evaluations(folder, *(evaluation(step, "on", right) for step, right in ((0, 9), (3, 19))))
    return folder


def test_metrics_and_evaluations_become_points(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tb"
    for _ in range(2):  # the second run replaces the file of the first
        assert main([str(run), "--out", str(out)]) == 0
    (file,) = out.iterdir()
    assert "3 steps" in capsys.readouterr().out and file.stat().st_mode & 0o777 == 0o600
    events = EventAccumulator(str(out), size_guidance={"scalars": 0})
    events.Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name, value in row.items() if name != "step" and value is not None}
    assert names <= set(events.Tags()["scalars"])
    for name in ("reward/mean", "completions/length_p90"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(r["step"], pytest.approx(r[name])) for r in rows]
    exact = [(e.step, e.value) for e in events.Scalars("eval/test/thinking_on/exact")]
    assert exact == [(0, pytest.approx(0.45)), (3, pytest.approx(0.95))]
    started = read_run(run).started
    assert started is not None
    wall_times = [pytest.approx(started + 4 * step, abs=0.01) for step in (1, 2, 3)]
    assert [e.wall_time for e in events.Scalars("loss")] == wall_times


def test_null_metrics_are_omitted(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null, "lr": 0.5, "time/rollout_s": 2.0}\n')
    record = read_run(folder)
    assert record.started and next(scalars(record)) == (1, record.started + 2.0, {"lr": 0.5, "time/rollout_s": 2.0})


def test_without_tensorboard_the_error_says_how_to_install_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([str(run), "--out", str(tmp_path / "tb")]) == 2
    assert "pip install 'grpo-v49[tensorboard]'" in capsys.readouterr().err and not (tmp_path / "tb").exists()
