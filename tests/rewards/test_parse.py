"""The parser: what is read, what is a commitment, and what cannot fool it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Answer, load_reward, parse_answer
from rewards.parse import FORMATS
from rewards.second_level import FILLER_WORDS, HEDGES, JOIN_WORDS, RANGE_WORDS

WRITTEN = {
    # every way to commit to level 2, with the row of the format table that reads it
    "ANSWER: ESI 2": "answer",
    "**ANSWER: ESI 2**": "answer",
    "**ANSWER:** ESI 2": "answer",
    "**Final Answer:** **ESI 2**": "answer",
    "answer: esi 2": "answer",
    "ANSWER: ESI-2": "answer",
    "ANSWER: ESI Level 2": "answer",
    "ANSWER: Level 2": "answer",
    "ANSWER: 2": "answer",
    "Answer: 2": "answer",
    "Final answer: 2": "answer",
    "The final answer is 2.": "answer",
    "Answer is ESI 2": "answer",
    "ANSWER ESI 2": "answer",
    "ANSWER - ESI 2": "answer",
    "ANSWER: [ESI 2]": "answer",
    "ANSWER:\nESI 2": "answer",
    "ANSWER: ESI level is 2": "answer",
    "ANSWER: ESI 2 - emergent": "answer",
    "Final ESI level: 2": "final",
    "Final ESI: 2": "final",
    "Final level: 2": "final",
    "Final triage level is 2": "final",
    "ESI level: 2": "labelled",
    "ESI level is 2": "labelled",
    "ESI: 2": "labelled",
    "ESI = 2": "labelled",
    "**ESI Level:** 2": "labelled",
    "Triage level: 2": "labelled",
    "So the ESI level is 2 here.": "labelled",
    "ANSWER: ESI\u20102": "answer",
    "ANSWER: ESI\u20112": "answer",
    "ANSWER: ESI\u20122": "answer",
    "ANSWER: ESI\u20132": "answer",
    "ANSWER: ESI\u20142": "answer",
    "ANSWER: ESI\u22122": "answer",
    "ANSWER:\u00a0ESI\u202f2": "answer",
    "ESI level \u2013 2": "alone",
    "ESI\u20112": "alone",
    "ESI-2": "alone",
    "ESI 2": "alone",
    "esi 2": "alone",
    "ESI Level 2": "alone",
    "**ESI 2**": "alone",
    "# ESI 2": "alone",
    "- ESI 2.": "alone",
    "2": "digit",
    "**2**": "digit",
}


@pytest.mark.parametrize(("written", "row"), WRITTEN.items())
def test_each_format_is_read_by_its_row_and_not_without_it(written: str, row: str) -> None:
    for text in (written, f"EXTRACTION: chest pain\nESI ALGORITHM: no lifesaving\n{written}\n"):
        assert parse_answer(text, thinking=False).level == 2
        assert parse_answer(text, thinking=False, formats=[row]).level == 2
    stronger = [name for name in FORMATS if FORMATS[name].rank < FORMATS[row].rank]
    assert parse_answer(written, thinking=False, formats=stronger).level is None


def test_every_row_of_the_format_table_has_a_case() -> None:
    assert set(WRITTEN.values()) == set(FORMATS)


@settings(deadline=None)
@given(level=st.integers(0, 99), row=st.sampled_from(sorted(WRITTEN)))
def test_only_the_five_levels_are_answers(level: int, row: str) -> None:
    answer = parse_answer(row.replace("2", str(level)), thinking=False)
    assert answer.level == (level if 1 <= level <= 5 else None)


REFUSED = [
    ("", "no answer"),
    ("could be ESI 3", "no answer"),
    ("This is not ESI 1 and ESI 2 is unlikely.", "no answer"),
    ("ESI ALGORITHM:\n1. Step A", "no answer"),
    ("ANSWER:\n1. The patient has chest pain", "no answer"),
    ("ANSWER: ESI n", "no answer"),
    ("ANSWER: not ESI 1", "no answer"),
    ("she can answer 2 questions", "no answer"),
    ("ANSWER: ESI 2-3", "range"),
    ("ANSWER: ESI 2–3", "range"),
    ("ANSWER: ESI 2/3", "range"),
    ("ANSWER: ESI 2 or 3", "range"),
    ("ANSWER: ESI 2 or ESI 3", "range"),
    ("ANSWER: ESI 2 (or maybe ESI 3)", "range"),
    ("ANSWER: ESI 2 to 3", "range"),
    ("ANSWER: ESI <1-5>", "range"),
    ("ANSWER: ESI 1, 2, 3, 4, 5", "range"),
    ("ANSWER: ESI 2, though level 3 fits as well", "range"),
    ("ESI level: 2-3", "range"),
    ("ESI 2-3", "range"),
    ("ESI 2 or 3", "range"),
    ("ANSWER: ESI 7", "out of range"),
    ("ANSWER: ESI 0", "out of range"),
    ("ANSWER: ESI 2.5", "out of range"),
    ("ANSWER: ESI 22", "out of range"),
    ("ANSWER: ESI 2nd", "out of range"),
    ("ANSWER: ESI \uff12", "out of range"),  # a full-width 2
    ("ANSWER: ESI \u0662", "out of range"),  # an Arabic-Indic 2
    ("ANSWER: ESI 1 ANSWER: ESI 2", "conflicting answers"),
    ("ANSWER: ESI 1\nANSWER: ESI 2", "conflicting answers"),
    ("ANSWER: ESI 1\nOr rather ESI level: 2", "conflicting answers"),
    ("ANSWER: ESI 1\nESI 2", "conflicting answers"),
    ("ANSWER: ESI 1\n2\n3\n4\n5", "conflicting answers"),
    ("ESI 1\nESI 2\nESI 3\nESI 4\nESI 5", "conflicting answers"),
    ("ESI level: 1. ESI level: 2.", "conflicting answers"),
]


@pytest.mark.parametrize(("completion", "reason"), REFUSED)
def test_a_completion_that_does_not_commit_to_one_level_is_no_answer(completion: str, reason: str) -> None:
    answer = parse_answer(completion, thinking=False)
    assert (answer.level, answer.reason) == (None, reason)


# ---- a second level -----------------------------------------------------------------------------------------------

TEMPLATES = {
    # where a level and what follows it may stand; a bare line without "ESI" is no list ("3 4" may be vital signs)
    "ANSWER: ESI {}": "range",
    "**ANSWER: {}": "range",
    "Final ESI level: {}": "range",
    "So the ESI level is {}": "range",
    "EXTRACTION: chest pain\nESI {}": None,
    "{}": None,
}
JOINERS = [
    *(f" {word} " for word in (*RANGE_WORDS, *JOIN_WORDS, *FILLER_WORDS)),
    *(f", {word} ESI " for word in (*RANGE_WORDS, *JOIN_WORDS)),
    *(f"\n{word} " for word in (*RANGE_WORDS, *JOIN_WORDS)),
    *(f"{blank}{sign}{blank}" for sign in "/|&+~,;→⇒↔…" for blank in ("", " ")),
    *(f"{blank}{dash}{blank}" for dash in "-\u2010\u2011\u2012\u2013\u2014\u2212" for blank in ("", " ")),
    " ", "  ", "\t", "\u00a0", "...", " ... ", " -> ", " => ", " >> ", " (", " [", " (ESI ", " / ESI ", ": ", ". ",
    "? ", ". Alternatively ", ".\n\nAlternatively, ESI ", " and/or ", ", or maybe a ", "\n→ ", "** or **",
    ", could also be ", ", might be a ", ", leaning ", " as well as ", ", at worst ", " up to ", ", possibly level ",
]  # fmt: skip
ENDINGS = ["", ".", ")", "**", ", both fit", "; see above", " and so on", *(f" {word} possible" for word in HEDGES)]

levels = st.integers(1, 5)
templates = st.sampled_from(sorted(TEMPLATES))


@settings(deadline=None, max_examples=600)
@given(a=levels, b=levels, joiner=st.sampled_from(JOINERS), template=templates, ending=st.sampled_from(ENDINGS))
def test_two_levels_that_are_joined_are_no_answer(a: int, b: int, joiner: str, template: str, ending: str) -> None:
    answer = parse_answer(template.format(f"{a}{joiner}{b}{ending}"), thinking=False)
    if a != b:
        assert answer.level is None
        assert answer.reason == TEMPLATES[template] or TEMPLATES[template] is None
    else:
        assert answer.level == a or TEMPLATES[template] is None


WORDS = (
    "or to through thru versus vs and but maybe possibly perhaps probably potentially alternatively otherwise else "
    "also plus then even though although however borderline leaning almost nearly"
)


def test_the_words_that_join_are_all_of_these() -> None:
    assert set(WORDS.split()) <= {*RANGE_WORDS, *JOIN_WORDS}


@pytest.mark.parametrize("joiner", JOINERS)
def test_every_joiner_joins(joiner: str) -> None:
    assert parse_answer(f"ANSWER: ESI 4{joiner}3", thinking=False).reason == "range"
    assert parse_answer(f"ANSWER: ESI 4{joiner}4", thinking=False).level == 4


@pytest.mark.parametrize(
    "said",
    [
        "ANSWER: 1 2 3 4 5",
        "ANSWER: 1. 2. 3. 4. 5.",
        "ANSWER: ESI 1, 2, 3, 4, and 5",
        "ANSWER: [1, 2, 3, 4, 5]",
        "ANSWER: ESI 2 but 3 is possible",
        "ANSWER: ESI 2 (3)",
        "ANSWER: ESI 2 (3) because both fit",
        "ANSWER: ESI 2 or three",
        "ANSWER: ESI 2 to 3 resources",
        "ANSWER: ESI 2-3 resources",
        "ANSWER: ESI\u20112\u20113",
        "ANSWER: ESI 2, 3 because of the pain",
        "ANSWER: ESI 2 (2 or 3)",
        "ANSWER: ESI 2 2 3",
        "ANSWER: ESI 2. This is high-risk, though level 3 fits",
        "ANSWER: ESI 2 if stable, otherwise ESI 1",
        "ANSWER: ESI 2, if not ESI 1",
        "ANSWER: ESI 2 or\n3, because",
        "ESI 2\nor 3",
        "2\nor 3",
        "ESI 2 → 3",
        "ESI 2 (or maybe 3)",
    ],
)
def test_a_list_a_range_and_two_commitments_are_no_answer(said: str) -> None:
    answer = parse_answer(said, thinking=False)
    assert (answer.level, answer.reason) == (None, "range")


HONEST = [
    # what an honest answer may go on with; {a} is its level, {b} any
    ". Resources: {b} expected",
    " (two resources)",
    " ({b} resources)",
    " (**{b}** resources)",
    ", {b} resources",
    " - {b} resources needed",
    " – {b} or more resources",
    " ({b}+ resources)",
    " (1-{b} resources)",
    " (needs {b}, i.e. labs)",
    ": {b} resources (labs, X-ray)",
    " with {b} resources",
    " and {b} resources expected",
    ", at least {b} different resources",
    ", {b} h of chest pain",
    " - {b}-year-old with stridor",
    " – a {b} yo boy",
    " because pain 9/10 and HR 110",
    " (5/10 pain)",
    ", 9/10 pain",
    " on {b} L of oxygen",
    " on {b}L of oxygen",
    ". BP 120/80, HR 98, RR 16, SpO2 97% on {b} L, temp 37.{b}",
    ". {b}% burns",
    " 120/80",
    ". {b} episodes of vomiting",
    "... {b} hours of pain",
    " ~{b} days of fever",
    " → {b} L of oxygen",
    " 1. Chest pain {b}. Diaphoresis",
    ". 1) chest pain {b}) sweating",
    " (1) chest pain ({b}) sweating",
    "\n\n1. Chest pain for {b} hours.\n{b}. Diaphoresis.",
    "\n- {b} resources\n- HR 110",
    "\n{b} resources are needed",
    "\nand {b} resources",
    "\n\nRationale: between {a} and {b} the former fits",
    ", not {b}",
    ", not ESI {b}",
    " rather than ESI {b}",
    " instead of {b}",
    " (not ESI {b}: no intervention)",
    " (1 = most urgent)",
    " of 5",
    " or so",
    ", to be seen within 10 minutes",
    ". Transfer to a level 1 trauma centre",
    " ({a})",
    ". ESI {a} applies",
    " - emergent",
    "** because of risk",
]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(
    a=levels, b=levels, written=st.sampled_from(HONEST), template=st.sampled_from(["ANSWER: ESI {}", "ESI level: {}"])
)
def test_what_an_honest_answer_goes_on_with_is_no_second_level(a: int, b: int, written: str, template: str) -> None:
    said = template.format(f"{a}{written.format(a=a, b=b)}")
    assert parse_answer(said, thinking=False).level == a


BINDING = [
    ("ESI level: 3 was considered.\nANSWER: ESI 2", 2, "ANSWER: ESI 2"),
    ("ESI 1\nANSWER: ESI 2", 2, "ANSWER: ESI 2"),
    ("Could be ESI 3.\nStep B: ESI 1 criteria\nESI level: 2", 2, "ESI level: 2"),
    ("ANSWER: ESI 2\nBecause of X.\nANSWER: 2", 2, "ANSWER: 2"),
    ("ANSWER: ESI 2\nThis could worsen to ESI 1.", 2, "ANSWER: ESI 2"),
    ("ANSWER: ESI 4\npain 9/10, 3 resources", 4, "ANSWER: ESI 4"),
]


@pytest.mark.parametrize(("completion", "level", "span"), BINDING)
def test_the_strongest_commitment_binds_and_the_last_of_equals_gives_the_span(
    completion: str, level: int, span: str
) -> None:
    answer = parse_answer(completion, thinking=False)
    assert answer.level == level
    assert answer.span is not None
    assert completion[slice(*answer.span)] == span
    assert answer.span[0] == completion.rindex(span)


READ = [
    # completion, prompt opened <think>, level, reason
    ("reasons</think>ANSWER: ESI 2", True, 2, "parsed"),
    ("ANSWER: ESI 2", True, None, "unclosed thinking"),
    ("ANSWER: ESI 1</think>ANSWER: ESI 2", True, 2, "parsed"),
    ("ANSWER: ESI 1</think>nothing", True, None, "no answer"),
    ("a</think>ANSWER: ESI 1</think>ANSWER: ESI 2", True, 2, "parsed"),
    ("a</think>ANSWER: ESI 1</think>", True, None, "no answer"),
    ("a</think>x<think>ANSWER: ESI 2", True, None, "unclosed thinking"),
    ("a</think>ANSWER: ESI 2<think>ANSWER: ESI 3", True, 2, "parsed"),
    ("ANSWER: ESI 2", False, 2, "parsed"),
    ("ANSWER: ESI 1</think>ANSWER: ESI 2", False, 2, "parsed"),
    ("<think>ANSWER: ESI 1</think>ANSWER: ESI 2", False, 2, "parsed"),
    ("<think>ANSWER: ESI 1", False, None, "unclosed thinking"),
    ("ANSWER: ESI 2<|im_end|>ANSWER: ESI 3", False, 2, "parsed"),
    ("<|endoftext|>ANSWER: ESI 3", False, None, "no answer"),
    ("thought<|im_end|></think>ANSWER: ESI 3", True, None, "unclosed thinking"),
]


@pytest.mark.parametrize(("completion", "thinking", "level", "reason"), READ)
def test_only_what_follows_the_thought_and_precedes_the_end_token_is_read(
    completion: str, thinking: bool, level: int | None, reason: str
) -> None:
    answer = parse_answer(completion, thinking=thinking)
    assert (answer.level, answer.reason) == (level, reason)


@settings(deadline=None)
@given(
    thought=st.text(alphabet="ANSWER: ESI12345\n </think>", max_size=80),
    level=st.integers(1, 5),
)
def test_no_thought_changes_the_answer_that_follows_it(thought: str, level: int) -> None:
    tail = f"\nANSWER: ESI {level}"
    completion = f"{thought}</think>{tail}"
    assert parse_answer(completion, thinking=True).level == level
    begin = len(completion) - len(tail) + 1
    assert parse_answer(completion, thinking=True).span == (begin, len(completion))


@settings(deadline=None)
@given(a=st.integers(1, 5), b=st.integers(1, 5), joint=st.sampled_from(["\n", " ", ". ", " or ", " - ", ", "]))
def test_two_answer_lines_are_an_answer_only_if_they_agree(a: int, b: int, joint: str) -> None:
    answer = parse_answer(f"ANSWER: ESI {a}{joint}ANSWER: ESI {b}", thinking=False)
    assert answer.level == (a if a == b else None)
    if answer.reason == "conflicting answers":
        assert answer.span == (14 + len(joint) - 1, 27 + len(joint) - 1)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_a_well_formed_answer(completion: str) -> None:
    answer = parse_answer(completion, thinking=False)
    assert isinstance(answer, Answer)
    assert (answer.level is None) == (answer.reason != "parsed")
    assert answer.span is None or 0 <= answer.span[0] < answer.span[1] <= len(completion)


UNITS = [
    "*", "ESI ", "ANSWER: ", "answer:" + " " * 50, "final ", "ANSWER: ESI 2 ", "\n", "ESI level is ", "2\n", "or ",
    "2 or ", "2 (2) ", "2\nor ", "not ESI 2 ", "level 2 ", "possible ", "-", " \n", "1. a ", "<think>",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("before", ["", "ANSWER: ESI 2 "])
def test_time_grows_no_faster_than_the_text(before: str, unit: str) -> None:
    # a quadratic reader needs minutes for this, ours needs 0.3 s for the slowest
    completion = before + unit * (100_000 // len(unit))
    began = time.process_time()
    parse_answer(completion, thinking=False)
    assert time.process_time() - began < 3.0


def test_ten_thousand_completions_are_scored_in_a_second() -> None:
    thought = "The patient is 54, in pain 8/10, with a heart rate of 110; step B could make it ESI 2, or ESI 3. " * 6
    said = f"{thought}</think>EXTRACTION: chest pain, sweating\nESI ALGORITHM:\nA: no\nB: yes\nANSWER: ESI 2"
    completions = [f"{said}. {thought[: i % 500]}" for i in range(10_000)]
    texts = [f"Stabbed {i} times, pain 9/10." for i in range(1250)]
    reward = load_reward("v49")

    def seconds() -> float:
        began = time.process_time()
        for i, completion in enumerate(completions):
            reward.score(text=texts[i // 8], gold=2, completion=completion, thinking=True, finished=True, case_id="c")
        return time.process_time() - began

    assert min(seconds() for _ in range(2)) < 1.0
