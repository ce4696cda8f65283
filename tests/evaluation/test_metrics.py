"""Rates on hand-made answers: by their definitions, by counting, and what must not change them."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.evaluation.metrics import RATES, JudgedAnswer, answer_row, baselines, multi_sample_stats, summarize
from grpo.evaluation.statistics import wilson
from grpo.types import Case
from rewards import Answer, load_reward, parse_answer

V49 = load_reward("v49")
PAIRS = st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(1, 5)), min_size=1, max_size=30)


def verdict(
    gold: int, said: str, *, text: str = "Cough.", tags: tuple[str, ...] = (), finished: bool = True
) -> JudgedAnswer:
    case = Case(f"{gold}-{said}-{text}", text, gold, tags)
    return JudgedAnswer(case, parse_answer(said, thinking=False), finished, 2, said)


def of_levels(pairs: list[tuple[int, int | None]], samples: int = 1) -> list[JudgedAnswer]:
    """One case for every ``samples`` pairs, with the first one's gold."""
    found = []
    for i, (_, said) in enumerate(pairs):
        gold = pairs[i - i % samples][0]
        answer = Answer(said, "parsed" if said else "no answer", None)
        found.append(JudgedAnswer(Case(f"c{i // samples}", "Cough.", gold), answer, True, 5, "", i % samples))
    return found


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
    rates = summarize(VERDICTS, V49)
    assert rates["n"] == 8
    assert rates["exact"] == 2 / 8
    assert rates["adjacent"] == 4 / 8  # two exact, 1→2 and 2→1; no parse is not adjacent
    assert rates["non_adjacent"] == 3 / 8  # 1→3, 2→4 and 5→3; no parse is no triage
    assert rates["under_triage"] == 3 / 8  # 1→2, 1→3, 2→4
    assert rates["over_triage"] == 2 / 8  # 2→1 and 5→3
    assert rates["dangerous_under"] == 2 / 8  # 1→3 and 2→4
    assert rates["high_acuity_under"] == 3 / 5 and rates["high_acuity_n"] == 5  # 1→2 as well; of gold 1 and 2 alone
    assert rates["no_parse"] == rates["clipped_ratio"] == 1 / 8
    assert rates["mean_length"] == 2
    assert rates["confusion"] == {
        "1": [1, 1, 1, 0, 0, 0],
        "2": [1, 0, 0, 1, 0, 0],
        "3": [0, 0, 1, 0, 0, 0],
        "4": [0, 0, 0, 0, 0, 1],
        "5": [0, 0, 1, 0, 0, 0],
    }
    for name in (*RATES, "clipped_ratio"):
        n = 5 if name == "high_acuity_under" else 8
        assert rates["intervals"][name] == pytest.approx(wilson(round(n * rates[name]), n)), name


def test_without_a_case_of_esi_1_or_2_nothing_is_said_of_them() -> None:
    found = summarize(VERDICTS[5:], V49)
    assert found["high_acuity_n"] == 0
    assert found["high_acuity_under"] is found["intervals"]["high_acuity_under"] is None
    always = baselines([3, 4])["always_5"]
    assert always["high_acuity_under"] is always["intervals"]["high_acuity_under"] is None and always["exact"] == 0
    together = multi_sample_stats(VERDICTS[5:])["majority"]
    assert together["high_acuity_under"] is None and together["non_adjacent"] == 1 / 3


@given(PAIRS)
def test_under_triage_of_esi_1_and_2_is_counted_over_them_alone(pairs: list[tuple[int, int | None]]) -> None:
    found, acute = summarize(of_levels(pairs), V49), [pair for pair in pairs if pair[0] in (1, 2)]
    under = sum(said is not None and said > gold for gold, said in acute)
    assert found["high_acuity_n"] == len(acute)
    assert found["high_acuity_under"] == (pytest.approx(under / len(acute)) if acute else None)
    others = [(gold, 1) for gold in (3, 4, 5)] * 7
    more = summarize(of_levels(pairs + others), V49)
    assert more["high_acuity_under"] == found["high_acuity_under"], "cases of ESI 3 to 5 are no part of it"
    assert more["intervals"]["high_acuity_under"] == found["intervals"]["high_acuity_under"]


def test_recall_is_over_gold_and_precision_over_answers() -> None:
    rates = summarize(VERDICTS, V49)
    assert rates["recall"]["1"] == {"n": 3, "recall": 1 / 3, "interval": pytest.approx(wilson(1, 3))}
    assert rates["precision"]["1"] == {"n": 2, "precision": 1 / 2, "interval": pytest.approx(wilson(1, 2))}
    assert rates["recall"]["3"]["recall"] == 1 and rates["precision"]["3"]["precision"] == 1 / 3
    assert rates["recall"]["4"]["recall"] == 0  # no parse is a miss
    assert rates["precision"]["5"] == {"n": 0, "precision": None, "interval": None}


def test_kappa_leaves_out_what_does_not_parse_and_nothing_else() -> None:
    without = summarize([v for v in VERDICTS if v.predicted is not None], V49)
    assert summarize(VERDICTS, V49)["qwk"] == without["qwk"]
    # gold − said: 0 −1 −2 1 −2 0 2: observed 14; expected Σ over 7 × 7 pairs of (a − b)² ÷ 7
    gold, said = (1, 1, 1, 2, 2, 3, 5), (1, 2, 3, 1, 4, 3, 3)
    expected = sum((a - b) ** 2 for a in gold for b in said) / 7
    assert without["qwk"] == pytest.approx(1 - 14 / expected)
    assert summarize(VERDICTS[-1:], V49)["qwk"] is None


def test_rules_and_tags_have_their_own_accuracy() -> None:
    rates = summarize(VERDICTS, V49)
    half = {"n": 2, "exact": 0.5, "interval": pytest.approx(wilson(1, 2))}
    none = {"n": 1, "exact": 0.0, "interval": pytest.approx(wilson(0, 1))}
    assert rates["by_rule"] == {
        "lifesaving_obeyed": half,
        "lifesaving_missed": half,
        "open_injury_missed": none,
        "severe_pain_missed": none,
    }
    assert rates["by_tag"] == {"a": half, "b": none}
    assert summarize(VERDICTS[5:6], V49)["by_rule"]["lifesaving_missed"] == {"n": 0, "exact": None, "interval": None}


@given(PAIRS)
def test_every_answer_is_right_under_over_or_none(pairs: list[tuple[int, int | None]]) -> None:
    rates = summarize(of_levels(pairs), V49)
    assert rates["exact"] + rates["under_triage"] + rates["over_triage"] + rates["no_parse"] == pytest.approx(1)
    assert rates["adjacent"] + rates["non_adjacent"] + rates["no_parse"] == pytest.approx(1)
    assert rates["dangerous_under"] <= min(rates["under_triage"], rates["non_adjacent"])
    assert sum(map(sum, rates["confusion"].values())) == len(pairs)
    recalled = sum(part["n"] * part["recall"] for part in rates["recall"].values() if part["n"])
    assert recalled / len(pairs) == pytest.approx(rates["exact"])


@given(PAIRS, st.integers(2, 4), st.integers(0, 10**6))
def test_repeating_every_answer_and_shuffling_them_changes_no_rate_and_no_interval(
    pairs: list[tuple[int, int | None]], samples: int, seed: int
) -> None:
    once = of_levels(pairs)
    often = [replace(v, sample=k) for v in once for k in range(samples)]
    random.Random(seed).shuffle(often)
    left, right = summarize(once, V49), summarize(often, V49)
    for name in (*RATES, "clipped_ratio", "qwk", "mean_length"):
        assert right[name] == (None if left[name] is None else pytest.approx(left[name])), name
    for name, interval in left["intervals"].items():
        assert right["intervals"][name] == (None if interval is None else pytest.approx(interval)), name
    assert right["n"] == left["n"]
    together = multi_sample_stats(often)
    assert together["majority"]["exact"] == left["exact"] and together["unanimous"]["share"] == 1.0
    assert together["pass_at_k"][str(samples)]["share"] == pytest.approx(left["exact"])


def test_what_several_answers_say_together() -> None:
    pairs = [
        (2, 2),
        (2, 3),
        (2, 3),
        (2, 2),
        (3, 3),
        (3, 3),
        (3, 5),
        (3, None),
        (4, None),
        (4, None),
        (4, None),
        (4, None),
    ]
    found = multi_sample_stats(of_levels(pairs, samples=4))  # the tie of 2 and 3 goes to 2
    assert found["majority"]["exact"] == 2 / 3 and found["majority"]["no_parse"] == 1 / 3
    assert found["majority"]["intervals"]["exact"] == wilson(2, 3)
    assert found["unanimous"] == {"n": 3, "share": 1 / 3, "interval": wilson(1, 3)}
    assert found["mean_spread"] == (1 + 2) / 2  # over the cases that have an answer
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    assert found["pass_at_k"]["1"]["share"] == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)
    assert found["pass_at_k"]["2"]["share"] == pytest.approx(2 * (1 - 1 / 6) / 3)  # one of six pairs holds none
    assert found["pass_at_k"]["4"]["share"] == pytest.approx(2 / 3)
    assert multi_sample_stats(of_levels([(3, None), (3, None)], samples=2))["mean_spread"] is None


def test_constants_score_what_the_level_mix_gives_away() -> None:
    golds = [1] * 14 + [2] * 11 + [3] * 5 + [4] * 4 + [5] * 2  # MIETIC-36
    found = baselines(golds)
    assert list(found) == [f"always_{level}" for level in range(1, 6)]
    assert round(100 * found["always_1"]["exact"], 1) == 38.9 and round(100 * found["always_2"]["adjacent"], 1) == 83.3
    assert found["always_1"]["under_triage"] == 0 and found["always_5"]["over_triage"] == 0
    assert (
        found["always_3"]["high_acuity_under"] == 1
        and found["always_2"]["high_acuity_under"] == 14 / 25
        and found["always_3"]["dangerous_under"] == 14 / 36
    )
    assert found["always_1"]["intervals"]["exact"] == wilson(14, 36)
    assert found["always_2"]["intervals"]["high_acuity_under"] == wilson(14, 25)
    for level in range(1, 6):
        said = summarize(of_levels([(gold, level) for gold in golds]), V49)
        assert all(found[f"always_{level}"][name] == said[name] for name in RATES)


def test_a_line_of_answers_holds_no_text_of_the_case() -> None:
    held = answer_row(VERDICTS[1])
    assert held["predicted"] == 2 and held["completion"] == "ANSWER: ESI 2" and held["sample"] == 0
    assert "text" not in held and "Chest tube placed." not in [value for key, value in held.items() if key != "id"]
