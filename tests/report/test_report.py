"""The report of a run: recorded values, escaped text, and remarks about what is missing. Runs are made of real configs,
rewards and records, with random log-probabilities."""

import base64
import dataclasses
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
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
from grpo.report.charts import COLORS, LEFT, RIGHT, WIDTH, Level, Line, Panel, chart
from grpo.report.evaluation import before_after, verdict
from grpo.report.figures import SECTIONS
from grpo.report.number_format import plain, tick_labels, ticks
from grpo.report.samples import DEPTHS, FIELDS, TOKEN_CLASSES, sample_run, token_texts
from grpo.report.views import draw, running_mean, thinned
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
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

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
    for number in range(1, steps + 1):
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
        step = StepRecord(number, tuple(groups), tuple(scores), batch, tokens, (), 0.1 / number, 0.5 / number, 0)
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


def test_the_answer_comes_first(whole: Path) -> None:
    page = Page(report(whole))
    assert page.shows("Exact answers rose in both thinking modes")
    assert page.shows(
        "On test, 20 cases, exact answers went from 45.0 % [25.8–65.8] to 95.0 % [76.4–99.1] with thinking"
    )
    assert page.shows("10 fixed, 0 broken; exact McNemar test, p = 0.002")
    assert page.shows("Always 2: 100.0 %."), "all cases are of gold 2"
    assert page.text.index("exact answers went") < page.text.index("Recipe")


@pytest.mark.parametrize(
    ("before", "after", "paired", "unpaired"),
    [
        ((9, 9), (19, 19), "Exact answers rose in both thinking modes", "Exact answers rose in both thinking modes"),
        ((19, 19), (9, 9), "Exact answers fell in both thinking modes", "Exact answers fell in both thinking modes"),
        (
            (9, 9),
            (14, 4),
            "No clear change in exact answers in both thinking modes",
            "No clear change in exact answers in",
        ),
        (
            (9, 9),
            (15, 3),
            "Exact answers rose with thinking, fell without thinking",
            "No clear change in exact answers in",
        ),
        ((9, 9), (15, 9), "Exact answers rose with thinking, did not clearly change without", "No clear change"),
    ],
)
def test_a_change_is_claimed_where_the_cases_or_the_intervals_show_one(
    whole: Path, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], paired: str, unpaired: str
) -> None:
    """Of 20 cases; six fixed and none broken is p = 2·½⁶ = 0.03, five p = 0.06."""
    folder = copy(whole, tmp_path)
    rights = {0: dict(zip(("on", "off"), before, strict=True)), 3: dict(zip(("on", "off"), after, strict=True))}
    add_evaluations(folder, *(evaluation(s, mode, right) for s, pair in rights.items() for mode, right in pair.items()))
    assert verdict(read_run(folder), "test")[0].startswith(paired)
    shutil.rmtree(folder / "eval")
    assert verdict(read_run(folder), "test")[0].startswith(unpaired)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to / "run")
    return to / "run"


def test_every_figure_with_a_value_is_drawn_and_reads_what_was_logged(whole: Path) -> None:
    page = Page(report(whole))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for title in (
        "Mean reward", "Both reward stds", "Groups without a signal", "Reward by component", "Advantage by component",
        "Finished and truncated", "Clipped ratio", "Lengths against the budget", "Why nothing was parsed",
        "Pull of the truncated", "KL to the reference", "Entropy", "Loss", "Gradient norm", "Learning rate",
        "Sampler and trainer apart", "Seconds per step", "Tokens per second", "Peak memory",
    ):  # fmt: skip
        assert page.shows(title), title
    read = [attributes["data-read"] for tag, attributes in page.tags if tag == "output"]
    assert "|".join(f"{r['reward/mean']:+.2f}".replace("-", "−") for r in rows) in read
    assert "|".join(f"{100 * r['completions/clipped_ratio']:.1f} %" for r in rows) in read
    assert "1|1|1" in read, "GiB"
    assert page.shows("0 at every step and not drawn: Tokens with a clipped ratio (clip_ratio/low, clip_ratio/high)")
    steps = {a["data-steps"] for t, a in page.tags if t == "figure"}
    assert steps == {"1 2 3"}


def test_the_recipe_shows_grades_and_what_was_set(whole: Path) -> None:
    page = Page(report(whole))
    assert page.shows("learning_rate 0.0012 differs a tiny adapter at 2e-7 would not move in 60 steps")
    assert page.shows("beta 0.04 inferred (the brief asks for a KL to the frozen base"), (
        "v49's note serves an equal value"
    )
    assert page.shows(f"max_new_tokens {BUDGET} set v49: 1024"), "and the file's note does not serve another one"
    assert page.shows("no parse −2 known v49's card")


def test_nothing_is_loaded_and_the_policy_names_what_runs(whole: Path) -> None:
    page = Page(report(whole))
    (policy,) = [a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert page.count(kind) == 1 and f"{kind}-src 'sha256-{digest}'" in policy
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
    assert page.count("script") == page.count("style") == 1 and page.count("img") == 0
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
    assert shown.shadings == ("loss", "kl", "entropy", "surprise") and not shown.remarks
    assert {(g.step, g.case) for g in shown.groups} == {(s, c.id) for s in (1, 2, 3) for c in CASES}
    group, other = (next(g for g in shown.groups if g.step == 1 and g.case == case.id) for case in CASES)
    assert [text for text, name in group.text if name] == ["intubat"]
    assert [text for text, name in other.text if name] == ["Open fracture", "pain 9/10"]
    for b, one in enumerate((group, other)):
        order = sorted(range(4), key=lambda g: -entry.advantages[b][g])
        assert [s.numbers for s in one.samples] == [(g + 1,) for g in order]
        for g, sample in zip(order, one.samples, strict=True):
            before = sum(
                len(c.ids) for c in (*entry.step.groups[0].completions, *entry.step.groups[1].completions)[: 4 * b + g]
            )
            number, logprob, loss, *_ = sample.tooltips.split("|")[1].split(" ")
            assert (number, logprob) == ("2", plain(float(entry.step.logprobs.logprobs[0][before + 1])))
            assert loss == plain(float(entry.account.loss[0][before + 1])), "the second token's, of this very row"
            signs = {c[0] for piece in sample.pieces for c in piece.classes.split() if c[0] in "lL"}
            assert signs == ({"L"} if entry.advantages[b][g] > 0 else {"l"}), "KL is small beside the advantage here"
            answer = "".join(piece.text for piece in sample.pieces if piece.in_answer)
            assert answer == ("" if sample.predicted == "no parse" else f"ANSWER: {sample.predicted}")


def test_identical_completions_are_shown_once(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", steps=1, said=(*SAID[:2], SAID[1], SAID[2], SAID[1].replace("Looks", "Is")))
    (group, _) = sample_run(read_run(folder), groups=2, text=True).groups
    assert sorted(sample.numbers for sample in group.samples) == [(1,), (2, 3), (4,), (5,)]
    assert Page(report(folder)).shows("Identical completions 2, 3")


@given(st.text(max_size=30))
def test_token_texts_add_up_to_what_was_said(text: str) -> None:
    one = completion(text or "a")
    texts = token_texts(TOKENIZER, one)
    assert texts is not None and len(texts) == len(one.ids)
    assert "".join(texts[:-1] if one.finished else texts) == one.text
    assert token_texts(TOKENIZER, dataclasses.replace(one, text=one.text + "x")) is None


def test_missing_pieces_are_said(tmp_path: Path) -> None:
    empty = record_run(tmp_path / "empty", steps=0)
    page = Page(report(empty))
    assert (
        page.shows("No step is done yet")
        and page.shows("There is no evaluation yet")
        and page.shows("Not evaluated yet")
    )
    assert page.shows("No completions to show") and page.count("figure") == 0

    going = record_run(tmp_path / "going", steps=2, planned=5)
    add_evaluations(going, evaluation(0, "on", 9))
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')
    shutil.rmtree(going / "ledger")
    page = Page(report(going))
    assert page.shows("At step 2 of 5") and page.shows("The run is not finished, or was not when it was copied: 2 of 5")
    assert page.shows("last line of metrics.jsonl is torn") and page.shows("only the warm start was evaluated")
    assert page.shows("No completions to show") and page.shows("no ledger in this run")
    assert page.shows("Started") and not page.shows("Last step")

    page = Page(report(record_run(tmp_path / "one", steps=1)))
    assert page.count("figure") > 15 and page.count("circle") > 10 and page.shows("Mean reward")


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
    assert page.shows("2 runs side by side") and page.shows("tiny: exact answers rose in both thinking modes")
    assert page.shows("other: no clear change in exact answers")
    assert (
        page.shows("loss.beta 0.04 0.1") and page.shows("train.seed 42 7") and not page.shows("loss.clip_low 0.2 0.2")
    )
    read = [a["data-read"] or "" for t, a in page.tags if t == "output"]
    assert any(r.endswith("|–") for r in read), "the shorter run has no third step"
    assert page.shows("Reward by component: tiny") and page.shows("Reward by component: other")
    assert page.shows("tiny · test") and page.shows("other · test")

    page = Page(report(whole, copy(whole, tmp_path)))
    assert page.shows("whole: exact") and page.shows("run: exact"), "equal names give way to the folders'"
    assert page.shows("None: their configs and rewards are equal.")


def test_the_page_keeps_its_size(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, bare = len(report(whole).encode()), len(report(whole, more=["--samples", "0"]).encode())
    limit = (full + bare) / 2e6
    kept = report(whole, more=["--max-mb", str(limit)])
    assert bare <= len(kept.encode()) <= limit * 1e6
    left_out = re.search(r"(\d+) groups? of completions omitted to keep the page", kept)
    assert left_out and int(left_out[1]) + kept.count('<details class="group"') == 6
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


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.integers(2, 8))
def test_ticks_are_round_even_and_within(low: float, width: float, most: int) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return  # narrower than a float's digits
    marks = ticks(low, high, most)
    assert 1 <= len(marks) <= max(most, 2)
    assert all(low - 1e-6 * width <= mark <= high + 1e-6 * width for mark in marks)
    steps = np.diff(marks)
    assert np.allclose(steps, steps[:1], rtol=1e-3)


def test_tick_labels_tell_ticks_apart() -> None:
    for marks in ([0.0, 2e-7, 4e-7], [0.0, 0.005], [9_000.0, 10_000.0], [-0.5, 0.0, 0.5]):
        for kind in ("plain", "percent", "whole"):
            assert len(set(tick_labels(marks, kind))) == len(marks)


def test_a_chart_draws_each_point_where_it_belongs() -> None:
    panel = Panel(
        [1, 2, 3, 5], [Line("a", [0.0, 1.0, None, 0.5], 0)], levels=[Level("<here>", 1.0, 1.0)], floor=0.0, ceiling=1.0
    )
    root = ElementTree.fromstring(str(chart(panel, title='a "title" <b>')))
    assert root.get("aria-label") == 'a "title" <b>' and [
        t.text for t in root.iter("text") if t.get("class") == "note"
    ] == ["<here>"]
    (path,) = [e for e in root.iter("path") if e.get("class") == "line c0"]
    assert path.get("d") == "M48.0,166.0 124.0,10.0", "bottom left, then a quarter across at the top; then a gap"
    (dot,) = list(root.iter("circle"))
    assert (dot.get("cx"), dot.get("cy")) == ("352.0", "88.0")


def test_a_zone_spans_its_values() -> None:
    zone = Level("zone", 0.25, 0.75)
    root = ElementTree.fromstring(
        str(chart(Panel([0, 1], [Line("a", [0.0, 1.0], 0)], levels=[zone], floor=0.0, ceiling=1.0), title="t"))
    )
    (box,) = [e for e in root.iter("rect") if e.get("class") == "zone"]
    assert (box.get("y"), box.get("height")) == ("49.0", "78.0"), "from 166 at 0 to 10 at 1"
    config, _ = load_config(TINY)
    assert SECTIONS["Token budget"][0].levels(config) == (Level("card 4–19 %", 0.04, 0.19),), "the card's band"


def test_long_runs_are_smoothed_and_still_read_every_step(whole: Path) -> None:
    run, figure = read_run(whole), SECTIONS["Reward"][0]
    values = [float(i % 7) for i in range(100)]
    long = dataclasses.replace(run, metrics=tuple({"step": i + 1, "reward/mean": v} for i, v in enumerate(values)))
    short = dataclasses.replace(run, name="short", metrics=long.metrics[:90])
    (alone,) = draw(figure, [long])
    (both,) = draw(figure, [long, short])
    said = [f"{v:+.2f}" if v else "0.00" for v in values]
    assert alone.legend[0].values.split("|") == said and both.legend[0].values.split("|") == said
    assert both.legend[1].values.split("|") == [*said[:90], *["–"] * 10]
    assert [view.svg.count('class="faint') for view in (alone, both)] == [1, 2]
    assert all("bold: running mean" in view.note for view in (alone, both))


def test_style_sheet_and_script_agree_with_the_code() -> None:
    style, script = (Path(page_module.__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    for shading, letter in TOKEN_CLASSES.items():
        signs = letter + (letter.upper() if shading in ("loss", "kl", "ratio") else "")
        for sign in signs:
            for depth in range(1, len(DEPTHS) + 1):
                assert re.search(rf"#shade-{shading}:checked\) \.{sign}{depth}\b", style), (shading, sign, depth)
        assert f"#shade-{shading}:checked) #note-{shading}" in style
    for color in range(COLORS):
        assert f".c{color} {{ stroke" in style and f".f{color} {{ fill" in style
    assert f"LEFT = {LEFT:g}, RIGHT = {WIDTH - RIGHT:g};" in script and f"* {WIDTH:g};" in script
    assert f"FIELDS = {json.dumps(list(FIELDS))};" in script


@given(st.lists(st.none() | st.floats(-10, 10), max_size=50), st.integers(1, 20))
def test_thinning_and_smoothing_keep_means_and_gaps(values: list[float | None], most: int) -> None:
    rows = [{"step": i + 1, "kl": value} for i, value in enumerate(values)]
    thin, note = thinned(rows, most)
    assert len(thin) <= most and (note == "") == (len(rows) <= most)
    assert not rows or thin[-1]["step"] == len(rows)
    smooth = running_mean(values)
    assert [v is None for v in smooth] == [v is None for v in values]
    known = [v for v in values if v is not None]
    assert all(min(known) - 1e-9 <= v <= max(known) + 1e-9 for v in smooth if v is not None)


def test_under_triage_of_esi_1_and_2_is_of_those_cases_alone(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    some = evaluation(0, "on", 9) | {"high_acuity_under": 0.25, "high_acuity_n": 8}
    old = {key: value for key, value in some.items() if key != "high_acuity_n"}
    none = some | {"high_acuity_under": None, "high_acuity_n": 0, "intervals": {"high_acuity_under": None}}
    told = {}
    for name, record in {"some": some, "old": old, "none": none}.items():
        add_evaluations(folder, record)
        (item,) = before_after(read_run(folder))
        told[name] = item.rates[3]
        points = [values for step, _, values in scalars(read_run(folder)) if "eval/test/thinking_on/exact" in values]
        assert ("eval/test/thinking_on/high_acuity_under" in points[0]) == (name == "some")
        page = report(folder)
        assert ("8 of them with gold 1 or 2" in page) == (name == "some")
        assert ('data-label="High-acuity under">–<' in page) == (name != "some")
    assert told["some"] and told["some"].before.interval == "7.1–59.1", "2 of 8, not 5 of 20"
    assert told["old"] is told["none"] is None


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


PROBE = """<!doctype html><meta charset="utf-8"><iframe id="page" width="390" height="2000" src="report.html"></iframe>
<pre id="found">waiting</pre>
<script>
document.getElementById("page").onload = (event) => {
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const svg = page.querySelector(".chart"), box = svg.getBoundingClientRect();
  const read = () => [...page.querySelectorAll("output")].map((out) => out.textContent).join();
  const before = read();
  svg.dispatchEvent(new view.PointerEvent("pointermove", {clientX: box.left + box.width * 0.2, bubbles: true}));
  const token = page.querySelector(".completion i");
  token.dispatchEvent(new view.PointerEvent("pointerover", {bubbles: true}));
  const found = {
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    scripts: page.scripts.length, images: page.images.length, hit: view.hit_by || "",
    charts: page.querySelectorAll("svg.chart").length, height: box.height,
    before, pointed: read(),
    told: page.getElementById("tooltip").textContent,
    colour: view.getComputedStyle(page.querySelector(".completion i[class*=L]")).backgroundColor,
  };
  document.getElementById("found").textContent = JSON.stringify(found);
  console.error("the probe was here");
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_on_a_phone(tmp_path: Path) -> None:
    """One launch: the page in a frame of 390 pixels, a probe beside it that looks, points, and speaks to the console,
    so that a console that says nothing at all would be noticed."""
    folder = record_run(tmp_path / "run", said=(f"{ATTACKS[0]} {ATTACKS[1]}</think>ANSWER: ESI 1", *SAID[1:]))
    add_evaluations(folder, *(evaluation(s, m, r) for s, r in ((0, 9), (3, 19)) for m in ("on", "off")))
    report(folder)
    (tmp_path / "probe.html").write_text(PROBE)
    done = subprocess.run(
        [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000",
            "--window-size=900,2200", "--dump-dom", (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, encoding="utf-8", timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "the probe was here" in said[0], said
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown
    found = json.loads(html.unescape(shown[1]))
    assert found["overflow"] == 0, "no sideways scroll"
    assert found["scripts"] == 1 and found["images"] == 0 and found["hit"] == ""
    assert found["charts"] > 15 and 150 < found["height"] < 220
    assert found["pointed"] != found["before"] and "log-prob" in found["told"]
    assert found["colour"].startswith("rgba(0, 114, 178"), "the style sheet's hash holds, and blue is likelier"
