"""The report of a run: recorded values, escaped text, and remarks about what is missing. Runs are made of real configs,
rewards and records, with random log-probabilities."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from grpo.batch import group_advantages, make_batch, reward_matrix
from grpo.commands.report import main
from grpo.commands.tensorboard import scalars
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.inspection.run_reader import read_run
from grpo.metrics import advantage_by_component, compute_token_terms, step_metrics
from grpo.report import page as page_module
from grpo.report.charts import COLORS, Line, Zone, line_chart, number, ticks
from grpo.report.evaluation import evaluated_sets
from grpo.report.figures import MAX_POINTS, SECTIONS, averaged, draw
from grpo.report.samples import DEPTHS, sample_run, token_texts
from grpo.run.folder import RunFolder, append_metrics, create_run, nan_to_none, write_json
from grpo.run.ledger import read_step, write_step
from grpo.types import Case, Completion, Group, Prompt, StepLogprobs, StepRecord
from rewards import load_reward

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
TOKENIZER = Tokenizer.from_file(str(TINY_WORLD_DIR / "base" / "tokenizer.json"))
END = TOKENIZER.token_to_id("<|im_end|>")
BUDGET = 60
ATTACKS = (
    "<script>hit()</script>",
    "</script><img src=x onerror=hit()>",
    "</style></div>\u202e<b onclick=hit()>&amp;\x00",
)

CASES = (
    Case("case-a", "54 yo man arrived intubated after a fall. Central line placed, BP 120/58.", 1),
    Case("case-b", "Open fracture of the left tibia, pain 9/10, distal pulses present.", 2),
)
SAID = (
    "The patient is intubated.\n</think>\n\nEXTRACTION:\nChief complaint: fall\nANSWER: ESI 1",
    "Looks stable.\n</think>\n\nANSWER: ESI 2",
    "Looks stable.\n</think>\n\nANSWER: ESI 3",
    "Let me check again. " * 12,
)


def record_run(
    folder: Path,
    *,
    steps: int = 3,
    planned: int | None = None,
    text: str = "full",
    cases: Sequence[Case] = CASES,
    said: Sequence[str] = SAID,
    more: Sequence[str] = (),
) -> Path:
    """A run folder as `grpo.train` leaves it, of made-up completions and log-probabilities."""
    overrides = [
        f"rollout.prompts_per_step={len(cases)}", f"rollout.group_size={len(said)}", "optim.micro_batch_size=1",
        f"rollout.max_new_tokens={BUDGET}", f"train.steps={planned or max(steps, 1)}",
        'evaluate.before_and_after={test = "x"}', 'evaluate.periodic={validation = "x"}', f"ledger.text={text}", *more,
    ]  # fmt: skip
    config, source = load_config(TINY, overrides)
    reward = load_reward("v49")
    create_run(folder, config, source, reward, device="a test")
    random = torch.Generator().manual_seed(0)
    for step_number in range(1, steps + 1):
        groups, scores = [], []
        for case in cases:
            completions = tuple(completion(text) for text in said)
            groups.append(Group(Prompt(case, (1, 2, 3), True), completions))
            scores.append(
                tuple(
                    reward.score(text=case.text, gold=case.gold_level, completion=c.text, thinking=True,
                                 finished=c.finished, case_id=case.id)
                    for c in completions
                )
            )  # fmt: skip
        batch = make_batch(
            groups,
            group_advantages(groups, reward_matrix(scores), config.advantage),
            config,
        )
        count = int(batch.completion_mask.sum())
        noise = [torch.rand(count, generator=random) for _ in range(2)]
        tokens = StepLogprobs(-noise[0].unsqueeze(0), -noise[1], noise[1])
        step = StepRecord(
            step_number, tuple(groups), tuple(scores), batch, tokens, (), 0.1 / step_number, 0.5 / step_number, 0
        )
        write_recorded(folder, step, text)
    return folder


def write_recorded(folder: Path, step: StepRecord, text: str) -> None:
    """A step's line of metrics and its ledger record."""
    run = read_run(folder)
    account = compute_token_terms(step.logprobs, step.batch, run.config.loss)
    shares = advantage_by_component(step, run.config.advantage)
    metrics = nan_to_none(step_metrics(step, account, shares, run.config) | {"lr": 1e-3})
    write_step(folder / "ledger", step, account, shares, metrics, text=text)
    cost = {"time/rollout_s": 1.0, "time/update_s": 3.0, "tokens_per_s/step": 50.0, "memory/peak_bytes": 2**30}
    append_metrics(RunFolder(folder), metrics | cost)


def completion(text: str) -> Completion:
    """The text's tokens and the end token; cut where the budget ends."""
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)
    finished = len(ids) < BUDGET
    kept = (*ids, END) if finished else ids[:BUDGET]
    spoken = kept[:-1] if finished else kept
    return Completion(kept, (-0.1,) * len(kept), finished, TOKENIZER.decode(spoken, skip_special_tokens=False))


def evaluation(
    step: int, mode: str, right: int, *, cases: str = "test", n: int = 20, tag: str = "adult"
) -> dict[str, Any]:
    """A record of ``eval.json``: ``right`` of n cases of gold 2 exact, the rest called 3."""
    exact = right / n
    return {
        "step": step, "cases": cases, "thinking": mode, "n": n, "exact": exact, "adjacent": 1.0, "dangerous_under": 0.0,
        "high_acuity_under": 1 - exact, "high_acuity_n": n, "no_parse": 0.0, "clipped_ratio": 0.0, "mean_length": 30.0,
        "by_rule": {"severe_pain_missed": {"n": 4, "exact": 0.25}, "lifesaving_missed": {"n": 0, "exact": None}},
        "by_tag": {tag: {"n": n, "exact": exact}},
        "confusion": {str(g): [0, right, n - right, 0, 0, 0] if g == 2 else [0] * 6 for g in range(1, 6)},
    }  # fmt: skip


def add_evaluations(folder: Path, *records: dict[str, Any]) -> None:
    write_json(folder / "eval.json", list(records))
    (folder / "eval").mkdir(exist_ok=True)
    for r in records:
        right = round(r["exact"] * r["n"])
        rows = [{"id": f"id-{i}", "esi": 2, "predicted": 2 if i < right else 3} for i in range(r["n"])]
        file = folder / "eval" / f"step_{r['step']:06d}_{r['cases']}_{r['thinking']}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report(*folders: Path, more: Sequence[str] = ()) -> str:
    out = folders[0].parent / "report.html"
    assert main([*map(str, folders), "--out", str(out), *more]) == 0
    return out.read_text(encoding="utf-8")


INLINE = ("i", "wbr", "mark", "code")


class Page(HTMLParser):
    """Start tags with their attributes, the text that is shown, and the contents of style and script."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.raw = "", {"style": "", "script": ""}
        self.inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in self.raw else ""
        self.text += "" if tag in INLINE else "\n"

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.raw[self.inside] += data
        else:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def shows(self, text: str) -> bool:
        return " ".join(text.split()) in " ".join(self.text.split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything in it. Read it, never write to it."""
    folder = record_run(tmp_path_factory.mktemp("runs") / "whole")
    records = [evaluation(step, mode, right) for step, right in ((0, 9), (3, 19)) for mode in ("on", "off")]
    add_evaluations(folder, *records)
    return folder


def test_evaluations_before_and_after_have_intervals_and_a_test(whole: Path) -> None:
    page = Page(report(whole))
    assert page.shows("test 20 cases, 20 of them with gold 1 or 2")
    assert page.shows("before training on 45.0 % (25.8–65.8)") and page.shows("step 3 on 95.0 % (76.4–99.1)")
    assert page.shows("Exact answers, thinking on: 10 fixed, 0 broken; exact McNemar test, p = 0.002")
    assert page.shows("always 2 – 100.0 %"), "all cases are of gold 2"
    assert page.shows("severe_pain_missed on 4 25.0 % (4.6–69.9) 25.0 % (4.6–69.9)")
    assert not page.shows("lifesaving_missed on"), "a rule without cases"
    assert page.text.index("Evaluation") < page.text.index("Mean reward") < page.text.index("max_new_tokens")


def test_answers_that_are_missing_give_no_test(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    shutil.rmtree(folder / "eval")
    assert [shown.changes for shown in evaluated_sets(read_run(folder))] == [[]]


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to / "run")
    return to / "run"


def test_every_figure_with_a_value_is_drawn_and_shows_the_last_value(whole: Path) -> None:
    page = Page(report(whole))
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    titles = [figure.title for figures in SECTIONS.values() for figure in figures]
    assert page.count("figure") == len(titles) and all(page.shows(title) for title in titles)
    assert page.count("svg") == len(titles) - 2, "clip ratio and zero variance are always 0"
    assert page.shows(f"mean {last['reward/mean']:.3g}")
    assert page.shows(f"clipped_ratio {100 * last['completions/clipped_ratio']:.1f} %")
    assert page.shows("Always 0: below 1 − clip_low, above 1 + clip_high.")


def test_the_recipe_shows_grades_and_what_was_set(whole: Path) -> None:
    page = Page(report(whole))
    assert page.shows("learning_rate 0.0012 differs a tiny adapter at 2e-7 would not move in 60 steps")
    assert page.shows("beta 0.04 inferred (our specification asks for a KL to the frozen base"), (
        "v49's note serves an equal value"
    )
    assert page.shows(f"max_new_tokens {BUDGET} set v49: 1024"), "and the file's note does not serve another one"
    assert page.shows("no parse -2 known v49's card")


def test_nothing_is_loaded_and_the_policy_names_what_runs(whole: Path) -> None:
    page = Page(report(whole))
    (policy,) = [a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.raw["style"].encode()).digest()).decode()
    assert page.count("style") == 1 and f"style-src 'sha256-{digest}'" in policy and page.count("script") == 0
    assert "default-src 'none'" in policy and "unsafe" not in policy
    loaded = [a.get("src") or a.get("href") or "" for t, a in page.tags if "src" in a or "href" in a]
    assert all(link.startswith(("#", "data:,")) for link in loaded) and len(loaded) > 5
    assert not [a for _, a in page.tags if "style" in a or any(name.startswith("on") for name in a)]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(link[1:] in ids for link in loaded if link.startswith("#")), "every link of the page leads somewhere"


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("colored", [True, False])
def test_what_a_model_or_a_case_says_stays_text(tmp_path: Path, attack: str, colored: bool) -> None:
    clean = Page(report(record_run(tmp_path / "clean", steps=1)))
    cases = (Case(f"id{attack}", f"Intubated {attack}", 1), CASES[1])
    folder = record_run(tmp_path / "run", steps=1, cases=cases, said=(f"{attack}</think>ANSWER: ESI 1", *SAID[1:]))
    if not colored:
        printable = "".join(c for c in attack if c.isprintable())  # no other name is taken for a model
        edit(folder / "config.json", "embedded:base", f"no{printable}where")
    add_evaluations(folder, evaluation(0, "on", 5, tag=attack))
    edit(folder / "config.json", "# differs: enough here", f"# differs: {attack}")
    page = Page(report(folder))
    shown = attack.replace("\u202e", "\\u202e").replace("\x00", "\\x00")
    for tag in ("script", "style", "img", "b"):
        more = 1 if tag == "b" else 0
        assert page.count(tag) <= clean.count(tag) + more * 100 and page.count(tag) >= 0
    assert page.count("script") == 0 and page.count("style") == 1 and page.count("img") == 0
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.shows(f"Intubated {shown}") and page.shows(f"{shown}</think>ANSWER: ESI 1")
    assert page.text.count(attack.split("\u202e")[0]) >= 3, "case id, case, completion, tag, note"
    assert "\u202e" not in page.text and "\x00" not in page.text


def edit(file: Path, old: str, new: str) -> None:
    """Replaces a text within a JSON file's strings."""
    before = file.read_text(encoding="utf-8")
    after = before.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
    assert after != before
    file.write_text(after, encoding="utf-8")


def test_without_text_no_case_and_no_completion_is_in_the_page(whole: Path) -> None:
    told = [case.text for case in CASES] + [case.id for case in CASES] + ["EXTRACTION", "Looks stable", "Let me check"]
    told += ["<|im_end|>", "</think>", "intubated", "tibia"]
    page = Page(report(whole))
    assert all(page.shows(text) for text in told)
    bare = Page(report(whole, more=["--no-text"]))
    everything = bare.text + "".join(value or "" for _, attributes in bare.tags for value in attributes.values())
    assert not [text for text in told if text in everything]
    assert bare.shows("omitted from this page with --no-text") and bare.shows("advantage +")


@pytest.mark.parametrize("text", ["redacted", "off"])
def test_a_ledger_without_texts_shows_its_numbers(tmp_path: Path, text: str) -> None:
    page = Page(report(record_run(tmp_path / "run", steps=1, text=text)))
    assert page.shows(f"ledger.text = {text}") and page.shows("· · · ·".replace(" ", ""))
    assert page.shows("case-a") == (text == "redacted")
    assert not page.shows("Looks stable") and page.shows("✓ ESI 1")


def test_tokens_are_colored_by_what_they_did_to_the_loss(whole: Path) -> None:
    entry = read_step(whole / "ledger", 1)
    shown = sample_run(read_run(whole), groups=9, text=True)
    assert not shown.remarks
    assert {(g.step, g.case) for g in shown.groups} == {(s, c.id) for s in (1, 2, 3) for c in CASES}
    group, other = (next(g for g in shown.groups if g.step == 1 and g.case == case.id) for case in CASES)
    assert [text for text, name in group.text if name] == ["intubat"]
    assert [text for text, name in other.text if name] == ["Open fracture", "pain 9/10"]
    for b, one in enumerate((group, other)):
        order = sorted(range(4), key=lambda g: -entry.advantages[b][g])
        assert [s.number for s in one.samples] == [g + 1 for g in order]
        for g, sample in zip(order, one.samples, strict=True):
            before = sum(
                len(c.ids) for c in (*entry.step.groups[0].completions, *entry.step.groups[1].completions)[: 4 * b + g]
            )
            tooltip = sample.pieces[1].tooltip
            logprob = number(float(entry.step.logprobs.logprobs[0][before + 1]))
            loss = number(float(entry.account.loss[0][before + 1]))
            assert tooltip.startswith(f"log-prob {logprob}, loss {loss}, KL "), "the second token's, of this very row"
            classes = {name for piece in sample.pieces for name in piece.classes.split()}
            signs = {name[:-1] for name in classes - {"answer"}}
            assert signs == ({"up"} if entry.advantages[b][g] > 0 else {"down"}), "KL is small beside the advantage"
            answer = "".join(piece.text for piece in sample.pieces if "answer" in piece.classes)
            assert answer.strip() == ("" if sample.predicted == "no parse" else f"ANSWER: {sample.predicted}")


@given(st.text(max_size=30))
def test_token_texts_add_up_to_what_was_said(text: str) -> None:
    one = completion(text or "a")
    texts = token_texts(TOKENIZER, one)
    assert texts is not None and len(texts) == len(one.ids)
    assert "".join(texts[:-1] if one.finished else texts) == one.text
    assert token_texts(TOKENIZER, dataclasses.replace(one, text=one.text + "x")) is None


def test_missing_pieces_are_said(tmp_path: Path) -> None:
    page = Page(report(record_run(tmp_path / "empty", steps=0)))
    assert page.shows("No step is done yet") and page.shows("There is no evaluation yet")
    assert page.shows("No completions to show") and page.count("figure") == 0

    going = record_run(tmp_path / "going", steps=2, planned=5)
    add_evaluations(going, evaluation(0, "on", 9))
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')
    shutil.rmtree(going / "ledger")
    page = Page(report(going))
    assert page.shows("The run is not finished, or was not when it was copied: 2 of 5")
    assert page.shows("last line of metrics.jsonl is torn") and page.shows("only the warm start was evaluated")
    assert page.shows("No completions to show") and page.shows("no ledger in this run")
    assert page.shows("Started") and not page.shows("Last step")

    page = Page(report(record_run(tmp_path / "one", steps=1)))
    assert page.count("figure") > 15 and page.shows("Mean reward")


def test_a_changed_ledger_is_named(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    edit(folder / "ledger" / "step_000001.jsonl", "Looks stable.", "Looks sta\ud800ble.")
    page = Page(report(folder))
    assert page.shows("Step 1 of the ledger was changed after it was written") and page.shows("Looks sta\\ud800ble.")
    assert page.shows("not coloured: their ids do not decode to the recorded text")


def test_several_runs_stand_side_by_side(whole: Path, tmp_path: Path) -> None:
    other = record_run(tmp_path / "other", steps=2, more=["loss.beta=0.1", "train.seed=7", "name=other"])
    add_evaluations(other, evaluation(0, "on", 9), evaluation(2, "on", 9))
    page = Page(report(whole, other))
    assert (
        page.shows("loss.beta 0.04 0.1") and page.shows("train.seed 42 7") and not page.shows("loss.clip_low 0.2 0.2")
    )
    assert re.search(r"Mean reward\s+tiny\s+\S+\s+other\s+\S+\s", page.text), "one chart for both"
    assert page.shows("Reward by component: tiny") and page.shows("Reward by component: other")
    assert page.shows("tiny · test") and page.shows("other · test")

    page = Page(report(whole, copy(whole, tmp_path)))
    assert page.shows("whole · test") and page.shows("run · test"), "equal names give way to the folders'"
    assert page.shows("None: their configs and rewards are equal.")


def test_the_page_keeps_its_size(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, bare = len(report(whole).encode()), len(report(whole, more=["--samples", "0"]).encode())
    limit = (full + bare) / 2e6
    kept = report(whole, more=["--max-mb", str(limit)])
    assert bare <= len(kept.encode()) <= limit * 1e6
    left_out = re.search(r"(\d+) groups? of completions omitted to keep the page", kept)
    assert left_out and int(left_out[1]) + len(re.findall(r"<summary>Step ", kept)) == 6
    assert "omitted" in capsys.readouterr().out
    assert main([str(whole), "--out", str(whole.parent / "none.html"), "--max-mb", "0.01"]) == 2
    assert "even without completions" in capsys.readouterr().err and not (whole.parent / "none.html").exists()


def broken(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "it holds no config.json"),
        (broken("config.json", "{"), "config.json: not valid JSON"),
        (broken("config.json", '{"config": {}, "source": {"toml": ""}}'), "config.json: version: Field required"),
        (broken("metrics.jsonl", '{"step": 1}\n[]\n{"step": 2}\n'), "metrics.jsonl:2: not a line of metrics"),
        (broken("metrics.jsonl", '{"step": "<b>"}\n'), "metrics.jsonl:1: not a line of metrics"),
        (broken("eval.json", "[{}]"), "eval.json: 0.step: Field required"),
        (broken("eval.json", "[["), "eval.json: not valid JSON"),
        (
            lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\n"),
            "a line of metrics: not UTF-8 (byte 0)",
        ),
    ],
)
def test_bad_input_is_one_clear_error(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[Path], None], says: str
) -> None:
    folder, out = copy(whole, tmp_path), tmp_path / "out.html"
    fault(folder)
    assert main([str(whole), str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1 and not out.exists()


def test_a_page_is_its_owners_alone_and_never_half_written(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([str(whole), "--out", str(out)]) == 0
    assert out.stat().st_mode & 0o777 == 0o600 and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert main([str(whole), "--out", str(tmp_path / "nowhere" / "page.html")]) == 3
    assert main([str(whole), "--samples", "-1"]) == 2


@given(st.floats(-1e6, 0), st.floats(1e-9, 1e6))
def test_ticks_are_round_even_and_within(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 7 and 0 in marks
    assert all(low - 1e-6 * (high - low) <= mark <= high + 1e-6 * (high - low) for mark in marks)
    spacings = np.diff(marks)
    assert np.allclose(spacings, spacings[:1], rtol=1e-3)


def test_a_chart_draws_each_point_where_it_belongs() -> None:
    line = Line("a", [(1, 0.0), (2, 1.0), (3, None), (5, 0.5)], 0)
    chart = line_chart("title", "caption", [line], zones=[Zone("<here>", 0.25, 0.75)])
    root = ElementTree.fromstring(str(chart.svg))
    assert chart.legend == (("a", 0, "0.5"),)
    assert [e.text for e in root.iter("text") if e.get("class") == "note"] == ["<here>"]
    (path,) = root.iter("path")
    assert path.get("d") == "M48.0,166.0L48.0,166.0L124.0,10.0M352.0,88.0L352.0,88.0", "a gap, then a dot"
    (box,) = root.iter("rect")
    assert (box.get("y"), box.get("height")) == ("49.0", "78.0"), "from 166 at 0 to 10 at 1"
    config, _ = load_config(TINY)
    assert SECTIONS["Token budget"][0].zones(config) == (Zone("card 4–19 %", 0.04, 0.19),), "the card's band"


@given(st.lists(st.none() | st.floats(-1e100, 1e100), min_size=1, max_size=5))
def test_any_values_give_a_chart(values: list[float | None]) -> None:
    svg = str(line_chart("", "", [Line("", list(enumerate(values)), 0)]).svg)
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg


def test_long_runs_are_averaged(whole: Path) -> None:
    run, figure = read_run(whole), SECTIONS["Reward"][0]
    metrics = tuple({"step": i + 1, "reward/mean": float(i % 2)} for i in range(2 * MAX_POINTS))
    (alone,) = draw(figure, [dataclasses.replace(run, metrics=metrics)])
    assert alone.legend == (("mean", 0, "0.5"),) and "Each point is the mean of 2 steps." in alone.caption
    (both,) = draw(figure, [dataclasses.replace(run, metrics=metrics), dataclasses.replace(run, name="short")])
    assert [label for label, _, _ in both.legend] == ["tiny", "short"]


def test_style_sheet_agrees_with_the_code() -> None:
    style = Path(page_module.__file__).with_name("page.css").read_text("utf-8")
    assert all(f".{kind}{depth + 1} {{" in style for kind in ("up", "down") for depth in range(len(DEPTHS)))
    assert all(f".c{color} {{ stroke" in style and f".k{color} {{ color" in style for color in range(COLORS))


@given(st.lists(st.none() | st.floats(-10, 10), max_size=50), st.integers(1, 20))
def test_averaging_keeps_means_and_gaps(values: list[float | None], limit: int) -> None:
    means = averaged([(i + 1, value) for i, value in enumerate(values)], limit)
    assert len(means) <= limit and (not values or means[-1][0] == len(values))
    known = [v for v in values if v is not None]
    assert all(min(known) - 1e-9 <= v <= max(known) + 1e-9 for _, v in means if v is not None)
    assert bool(known) == any(v is not None for _, v in means)


def test_under_triage_of_esi_1_and_2_is_of_those_cases_alone(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    some = evaluation(0, "on", 9) | {"high_acuity_under": 0.25, "high_acuity_n": 8}
    old = {key: value for key, value in some.items() if key != "high_acuity_n"}
    none = some | {"high_acuity_under": None, "high_acuity_n": 0, "intervals": {"high_acuity_under": None}}
    told = {}
    for name, record in {"some": some, "old": old, "none": none}.items():
        add_evaluations(folder, record)
        (item,) = evaluated_sets(read_run(folder))
        told[name] = item.rows[0]["cells"][3]
        points = [values for step, _, values in scalars(read_run(folder)) if "eval/test/thinking_on/exact" in values]
        assert ("eval/test/thinking_on/high_acuity_under" in points[0]) == (name == "some")
        page = report(folder)
        assert ("8 of them with gold 1 or 2" in page) == (name == "some")
    assert told == {"some": "25.0 % (7.1–59.1)", "old": "–", "none": "–"}, "2 of 8, not 5 of 20"


def test_a_copied_run_gives_the_same_page(whole: Path, tmp_path: Path) -> None:
    """The dates of a copy's files are those of the copying: nothing is read off them."""
    pages = []
    for i, folder in enumerate((copy(whole, tmp_path / "a"), copy(whole, tmp_path / "b"))):
        for file in folder.rglob("*"):
            os.utime(file, (10**9 * i, 10**9 * i))
        pages.append(report(folder))
    assert pages[0] == pages[1]
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in header.items() if k != "started"}))
    assert read_run(folder).started is None and Page(report(folder)).shows("Started unknown")
