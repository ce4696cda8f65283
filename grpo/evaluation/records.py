"""Evaluation records of a run: appending one to ``eval.json`` and the table printed at the end of a run."""

from collections.abc import Iterable, Sequence
from typing import Any

from grpo.evaluation.answers import answer_lines
from grpo.evaluation.metrics import JudgedAnswer
from grpo.run.folder import RunFolder, read_evaluations, write_json
from grpo.runtime.atomic_files import make_private_folder, write_atomic
from grpo.runtime.terminal import escape_control, pad_or_truncate

TITLES = ("exact", "95 % interval", "adjacent", "dangerous", "no parse", "clipped")


def append_evaluation(
    run: RunFolder, record: dict[str, Any], answers: Sequence[JudgedAnswer], *, text: bool = True
) -> None:
    """Append a record to ``eval.json`` and write its answers to ``eval/``. A record of the same step, set and mode is
    replaced.

    Args:
        text: whether to include the answers' texts.
    """
    key = (record["step"], record["cases"], record["thinking"])
    make_private_folder(run.path / "eval")
    write_atomic(run.path / "eval" / f"step_{key[0]:06d}_{key[1]}_{key[2]}.jsonl", answer_lines(answers, text=text))
    others = [other for other in read_evaluations(run) if (other["step"], other["cases"], other["thinking"]) != key]
    write_json(run.evaluations, [*others, record])


def before_after_table(records: Iterable[dict[str, Any]]) -> str:
    """Return the evaluations of a run as a table of at most 80 columns: for each set and thinking mode, the first
    evaluation above the last one, in percent of the cases, with the 95 % interval of exact.

    A set that was evaluated once has a single row. The interval is blank where the record has none.

    >>> first = {"cases": "test", "thinking": "on", "step": 0, "n": 4, "exact": 0.5, "adjacent": 1.0,
    ...          "dangerous_under": 0.0, "no_parse": 0.25, "clipped_ratio": 0.25}
    >>> print(before_after_table([first, {**first, "step": 9, "exact": 1.0, "intervals": {"exact": [0.51, 1.0]}}]))
    % of cases          exact  95 % interval  adjacent  dangerous  no parse  clipped
    test, thinking on, n = 4
      step 0             50.0                    100.0        0.0      25.0     25.0
      step 9            100.0     51.0–100.0     100.0        0.0      25.0     25.0
    """
    by_set: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        by_set.setdefault((record["cases"], record["thinking"]), []).append(record)
    lines = [_line("% of cases", TITLES)]
    for (name, thinking), members in by_set.items():
        title = pad_or_truncate(escape_control(name), 48).rstrip()
        title += f", thinking {escape_control(thinking)}, n = {members[-1]['n']}"
        lines.append(pad_or_truncate(title, 80).rstrip())
        for record in members[:1] + members[1:][-1:]:
            exact, *others = (
                f"{100 * record[key]:.1f}"
                for key in ("exact", "adjacent", "dangerous_under", "no_parse", "clipped_ratio")
            )
            bounds = record.get("intervals", {}).get("exact", ())[:2]
            interval = "–".join(f"{100 * bound:.1f}" for bound in bounds)
            lines.append(_line(f"  step {record['step']}", (exact, interval, *others)))
    return "\n".join(lines)


def _line(label: str, cells: Sequence[str]) -> str:
    """Return a label of 18 columns and cells as wide as their titles, at least 5: 80 columns in all."""
    columns = (f"  {cell:>{max(5, len(title))}}" for cell, title in zip(cells, TITLES, strict=True))
    return (pad_or_truncate(label, 18) + "".join(columns)).rstrip()
