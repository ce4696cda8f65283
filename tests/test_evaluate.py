"""Rates of an evaluation on hand-made answers, and what a run writes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo.config import load_config
from grpo.evaluate import Verdict, evaluate, summarise
from grpo.policy import Policy
from grpo.run import Run, add_evaluation, before_after, evaluations
from grpo.types import Case, Completion
from rewards import load_reward, parse_answer

TINY = Path(__file__).parent.parent / "configs" / "tiny.toml"


def verdict(
    gold: int, said: str, *, text: str = "Cough.", tags: tuple[str, ...] = (), finished: bool = True
) -> Verdict:
    case = Case(f"{gold}-{said}-{text}", text, gold, tags)
    return Verdict(case, parse_answer(said, thinking=False), Completion((1, 2), (0.0, 0.0), finished, said))


VERDICTS = [
    verdict(1, "ANSWER: ESI 1", text="Arrived intubated.", tags=("a",)),
    verdict(1, "ANSWER: ESI 2", text="Chest tube placed.", tags=("a", "b")),
    verdict(1, "ANSWER: ESI 3"),
    verdict(2, "ANSWER: ESI 1"),
    verdict(2, "ANSWER: ESI 4", text="Open fracture, pain 9/10."),
    verdict(3, "ANSWER: ESI 3"),
    verdict(5, "ANSWER: ESI 3"),
    verdict(4, "no idea", finished=False),
]


def test_rates_by_their_definitions() -> None:
    rates = summarise(VERDICTS, load_reward("v49"))
    assert rates["n"] == 8
    assert rates["exact"] == 2 / 8
    assert rates["adjacent"] == 4 / 8  # two exact, 1→2 and 2→1; no parse is not adjacent
    assert rates["dangerous_under"] == 2 / 8  # 1→3 and 2→4
    assert rates["high_acuity_under"] == 3 / 8  # 1→2 as well
    assert rates["no_parse"] == rates["clipped_ratio"] == 1 / 8
    assert rates["by_rule"]["lifesaving_missed"] == {"n": 2, "exact": 0.5}
    assert rates["by_rule"]["open_injury_missed"] == {"n": 1, "exact": 0.0}
    assert rates["by_rule"]["severe_pain_missed"] == {"n": 1, "exact": 0.0}
    assert rates["by_tag"] == {"a": {"n": 2, "exact": 0.5}, "b": {"n": 1, "exact": 0.0}}
    assert rates["confusion"] == {
        "1": [1, 1, 1, 0, 0, 0],
        "2": [1, 0, 0, 1, 0, 0],
        "3": [0, 0, 1, 0, 0, 0],
        "4": [0, 0, 0, 0, 0, 1],
        "5": [0, 0, 1, 0, 0, 0],
    }


def test_a_rule_that_applies_to_no_case_has_no_accuracy() -> None:
    assert summarise(VERDICTS[5:6], load_reward("v49"))["by_rule"]["lifesaving_missed"] == {"n": 0, "exact": None}


def test_an_evaluation_is_written_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    record = {"step": 3, "cases": "x", "thinking": "on", **summarise(VERDICTS, load_reward("v49"))}
    for _ in range(2):
        add_evaluation(run, record, VERDICTS)
    assert evaluations(run) == [json.loads(json.dumps(record))]
    answers = (tmp_path / "eval" / "step_000003_x_on.jsonl").read_text().splitlines()
    assert [json.loads(line)["predicted"] for line in answers] == [1, 2, 3, 1, 4, 3, 3, None]
    assert "exact" in before_after(evaluations(run))


@pytest.mark.parametrize("size", [1, 3])
def test_answers_do_not_depend_on_the_batch_or_the_order(make_policy: Callable[..., Policy], size: int) -> None:
    policy = make_policy()
    cases = [Case(f"c{i}", "Cough. " * (i % 3 + 1), 3) for i in range(5)]

    def answers(given: list[Case], batch: int, temperature: float = 1.0) -> dict[str, tuple[int, ...]]:
        overrides = [f"evaluate.batch_size={batch}", f"evaluate.temperature={temperature}", "evaluate.max_new_tokens=9"]
        config, _ = load_config(TINY, overrides)
        verdicts = evaluate(policy, given, config, name="x", thinking=True)
        assert [v.case for v in verdicts] == given
        return {v.case.id: v.completion.ids for v in verdicts}

    assert answers(cases, 5) == answers(cases[::-1], size)
    assert len(set(answers(cases, 5).values())) > 1
