"""The table of a run's evaluations at its end."""

import pytest

from grpo.config import load_config
from grpo.evaluation.records import before_after_table
from grpo.runtime.terminal import display_width

MEASURED = {"test": (0.62, 0.996), "mietic36": (0.5, 1.0), "validation": (0.625, 0.9995)}
"""Set of ``tiny.toml`` → exact before and after."""


def evaluated(name: str, thinking: str, step: int, exact: float, **more: object) -> dict[str, object]:
    rates = {"adjacent": 1.0, "dangerous_under": 0.1, "no_parse": 0.25, "clipped_ratio": 1.0}
    interval = {"intervals": {"exact": [max(0.0, exact - 0.04), 1.0]}}
    return {"cases": name, "thinking": thinking, "step": step, "n": 500, "exact": exact, **rates, **interval, **more}


def test_the_closing_table_of_the_tiny_config_fits_80_columns() -> None:
    config, _ = load_config("configs/tiny.toml")
    section = config.evaluate
    assert {*section.before_and_after, *section.periodic} == set(MEASURED)
    keys = [(name, mode) for name in MEASURED for mode in section.thinking]
    records = [
        evaluated(name, mode, step, MEASURED[name][step > 0]) for step in (0, config.train.steps) for name, mode in keys
    ]
    between = [evaluated("validation", "on", section.every, 0.25)]  # neither the first nor the last
    lines = before_after_table(records[:6] + between + records[6:]).splitlines()
    assert max(map(display_width, lines)) <= 80
    head, rows = lines[0], [lines[i : i + 3] for i in range(1, len(lines), 3)]
    assert [row[0] for row in rows] == [f"{name}, thinking {mode}, n = 500" for name, mode in keys]
    for (name, _), (_, first, last) in zip(keys, rows, strict=True):
        before, after = (f"{100 * exact:.1f}" for exact in MEASURED[name])
        assert first.split()[:4] == ["step", "0", before, f"{100 * (MEASURED[name][0] - 0.04):.1f}–100.0"]
        assert last.split()[:3] == ["step", str(config.train.steps), after]
        assert first.split()[4:] == last.split()[4:] == ["100.0", "10.0", "25.0", "100.0"]
        for title in ("exact", "95 % interval", "adjacent", "dangerous", "no parse", "clipped"):
            end = head.index(title) + len(title)  # each number ends under its title
            assert all(line[end - 1].isdigit() and line[end : end + 1] in ("", " ") for line in (first, last))


@pytest.mark.parametrize("name", ["x" * 80, "日本" * 40, "\x1b[2J" * 20])
@pytest.mark.parametrize("step", [7, 10**9, 10**30])
def test_no_name_or_number_makes_the_table_wider(name: str, step: int) -> None:
    records = [evaluated(name, "on", 0, 0.5), evaluated(name, "on", step, 1.0, n=step, intervals={})]
    table = before_after_table([*records, evaluated(name, "off", step, 0.0, n=step)])
    lines = table.splitlines()
    assert max(map(display_width, lines)) <= 80 and "\x1b" not in table
    assert [", thinking on, n = " in lines[1], ", thinking off, n = " in lines[4]] == [True, True]
    assert len(lines) == 6, "a set evaluated once has one row"
