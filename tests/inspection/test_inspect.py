"""What a person sees of a step: it fits, it says what the ledger holds, and nothing in it reaches the terminal raw."""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import pty
import re
import shutil
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from grpo.commands.inspect import main
from grpo.inspection.run_reader import read_header
from grpo.inspection.step_records import step_record, token_records
from grpo.inspection.step_text import step_lines, token_lines
from grpo.run.ledger import LedgerStep, read_step
from grpo.runtime.terminal import display_width, escape_control, pad_or_truncate, screen_width, wrap
from tests.support.recorded_runs import recorded, rewritten

HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202eevil\u2066\r\x9b31m\tESI"
"""Clear the screen, set the title, turn the writing round, go back, one-byte CSI."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.getbasetemp(), "plain")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.getbasetemp(), "rich")


def look(run: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(run), *more])
    return code, out.getvalue(), err.getvalue()


def shown(run: Path, *more: str) -> str:
    code, out, err = look(run, *more)
    assert (code, err) == (0, "")
    return out


def record(run: Path, *more: str) -> Any:
    return json.loads(shown(run, *more, "--json"))


def case_of(run: Path, step: int, group: int) -> str:
    return read_step(run / "ledger", step).step.groups[group].prompt.case.id


@pytest.fixture(params=[60, 80, 123])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Any]]:
    """(columns, a stream that is a terminal of that width)."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, request.param, 0, 0))

    class Screen(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return follower

    screen = Screen()
    monkeypatch.setattr(sys, "__stdout__", screen)
    yield request.param, screen
    os.close(leader)
    os.close(follower)


# --- it fits, and it says what the ledger holds ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "rich"])
@pytest.mark.parametrize("text", ["full", "redacted"])
def test_every_line_fits_80_columns(plain: Path, rich: Path, tmp_path: Path, kind: str, text: str) -> None:
    run = {"plain": plain, "rich": rich}[kind]
    run = run if text == "full" else rewritten(run, tmp_path / "run", text=text)
    for step in ("1", "2", "3"):
        case = case_of(run, int(step), 1)
        for more in ([], ["--case", case], ["--case", case, "--member", "3"]):
            for line in shown(run, "--step", step, *more).splitlines():
                assert display_width(line) <= 80 and line == line.rstrip() and escape_control(line) == line


def test_a_step_shows_each_of_its_groups(rich: Path) -> None:
    entry = read_step(rich / "ledger", 2)
    out = shown(rich, "--step", "2")
    for group, row, rewards in zip(entry.step.groups, entry.step.scores, entry.rewards, strict=True):
        (line,) = [line for line in out.splitlines() if re.match(rf"\d {group.prompt.case.id} ", line)]
        cells = line.split()[1:]
        assert cells[1] == str(group.prompt.case.gold_level)
        assert (cells[2] == "yes") == group.prompt.thinking
        cells = [cell for cell in cells if cell != "yes"]
        mean = math.fsum(rewards) / 4
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / 3)
        assert cells[2:4] == [f"{mean:+.2f}", f"{std:.2f}"]
        assert cells[4] == "".join(str(score.answer.level or "–") for score in row)
        assert cells[5] == "".join("e" if c.finished else "b" for c in group.completions)
        in_baseline = [r for r, c in zip(rewards, group.completions, strict=True) if c.finished]
        assert (f"{std:.2f} yes" in line) == (len(set(in_baseline)) <= 1)
    assert len(entry.step.replaced_groups) == 1
    assert f"replaced: {entry.step.replaced_groups[0].case_id}, 4 completions, " in out
    assert "run tiny, step 2 of 3" in out and f"reward/mean {entry.metrics['reward/mean']:.4g}" in out


def test_the_last_step_is_the_default(plain: Path) -> None:
    assert shown(plain) == shown(plain, "--step", "3") != shown(plain, "--step", "2")


def test_a_case_shows_its_completions(plain: Path) -> None:
    entry = read_step(plain / "ledger", 1)
    group, row = entry.step.groups[0], entry.step.scores[0]
    out = shown(plain, "--step", "1", "--case", group.prompt.case.id)
    case, *members = re.split(r"(?m)^member \d: ", out)
    assert " ".join(group.prompt.case.text.split()) in " ".join(case.split())
    for g, (completion, score, text) in enumerate(zip(group.completions, row, members, strict=True)):
        assert text.startswith(f"reward {score.total:+.3f}, advantage {entry.advantages[0, g]:+.3f}\n")
        assert " ".join(completion.text.split()) in " ".join(text.split())
        assert f"{'end' if completion.finished else 'budget'}, {len(completion.ids)} tokens" in text
        for fired in score.fired:
            assert fired.span is not None and f"fired    {fired.rule} {fired.value:+.3f}" in text
            assert group.prompt.case.text[slice(*fired.span)].split()[0] in text
    assert re.search(r"^open_injury_missed +-0\.500 +[+-]0\.\d{3}", out, re.MULTILINE)


def test_the_record_of_a_case_adds_up(rich: Path) -> None:
    for step in (1, 2, 3):
        for b in (0, 1):
            (group,) = record(rich, "--step", str(step), "--case", f"#{b}")["groups"]
            entry = read_step(rich / "ledger", step)
            assert (
                group["case"] == case_of(rich, step, b) and group["case_text"] == entry.step.groups[b].prompt.case.text
            )
            for member in group["completions"]:
                rewards = [part["reward"] for part in member["components"].values()]
                advantages = [part["advantage"] for part in member["components"].values()]
                assert math.fsum(rewards) == member["reward"]
                assert math.fsum(advantages) == pytest.approx(member["advantage"], abs=1e-12)
                if member["predicted"] is not None:
                    assert str(member["predicted"]) in member["answer"]["text"]
                for fired in member["fired"]:
                    assert group["case_text"][slice(*fired["match"]["span"])] == fired["match"]["text"]


def test_the_tokens_are_those_of_the_tensors(rich: Path) -> None:
    sides = set()
    for step in (1, 2, 3):
        entry = read_step(rich / "ledger", step)
        tensors = load_file(rich / "ledger" / f"step_00000{step}.safetensors")
        for row in range(8):
            start, length = int(tensors["lengths"][:row].sum()), int(tensors["lengths"][row])
            terms = token_records(entry, row // 4, row % 4, None)
            assert len(terms) == 2 * length
            for token in terms:
                e, t = token["epoch"] - 1, start + token["position"]
                assert token["id"] == tensors["completion_ids"][t] and token["token"] is None
                assert (
                    token["logprob"] == tensors["logprobs"][e, t] and token["old_logprob"] == tensors["logprobs"][0, t]
                )
                assert token["ref_logprob"] == tensors["ref_logprobs"][t] and token["kl"] == tensors["kl"][e, t]
                assert token["sampler_logprob"] == tensors["sampler_logprobs"][t]
                assert token["ratio"] == tensors["ratio"][e, t] and token["loss"] == tensors["loss"][e, t]
                assert token["weight"] == tensors["token_weights"][row] and token["entropy"] == tensors["entropy"][t]
                assert token["clip"] in (None, "high" if token["ratio"] > 1 else "low")
                assert (token["clip"] is None) == (tensors["clip"][e, t] == 0)
                sides.add(token["clip"])
    assert sides == {None, "low", "high"}


def test_the_tokens_spell_the_completion(plain: Path) -> None:
    (group,) = record(plain, "--step", "1", "--case", "#1", "--member", "2")["groups"]
    (member,) = group["completions"]
    assert member["member"] == 2 and member["stopped"] == "end" and len(member["token_terms"]) == member["tokens"]
    assert "".join(token["token"] for token in member["token_terms"][:-1]) == member["text"]


def test_a_member_shows_a_row_a_token_in_each_inner_epoch(rich: Path) -> None:
    case = case_of(rich, 1, 0)
    out = shown(rich, "--step", "1", "--case", case, "--member", "1")
    (group,) = record(rich, "--step", "1", "--case", case, "--member", "1")["groups"]
    terms = group["completions"][0]["token_terms"]
    rows = [line for line in out.splitlines() if re.match(r" *\d+ .*e[-+]\d\d$", line)]
    assert len(rows) == len(terms) and "inner epoch 1 of 2" in out and "inner epoch 2 of 2" in out
    for token, line in zip(terms, rows, strict=True):
        assert line.split()[0] == str(token["position"]) and line.endswith(f"{token['loss']:.2e}")
        assert (f" {token['clip']} " in line) == (token["clip"] is not None)
    total = math.fsum(token["loss"] for token in terms if token["epoch"] == 2)
    assert f"inner epoch 2 of 2, sum of loss {total:.3e}\n" in out
    assert any(token["clip"] for token in terms)


# --- nothing reaches the terminal raw ----------------------------------------------------------------------


def hostile_entry(entry: LedgerStep) -> LedgerStep:
    groups = []
    for group in entry.step.groups:
        case = dataclasses.replace(
            group.prompt.case, id=f"{HOSTILE}{group.prompt.case.id}", text=HOSTILE * 20, tags=(HOSTILE,)
        )
        said = tuple(dataclasses.replace(c, text=f"{HOSTILE}\n{c.text}日本語" * 3) for c in group.completions)
        groups.append(dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, case=case), completions=said))
    return dataclasses.replace(entry, step=dataclasses.replace(entry.step, groups=tuple(groups)))


@pytest.fixture(scope="module")
def hostile(rich: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(rich, tmp_path_factory.mktemp("hostile") / "run", hostile_entry)


VIEWS = ([], ["--case", "#0"], ["--case", "#1", "--member", "2"])


@pytest.mark.parametrize("more", VIEWS)
def test_what_a_terminal_would_obey_is_shown_instead(hostile: Path, more: list[str]) -> None:
    out = shown(hostile, *more)
    assert all(c.isprintable() or c == "\n" for c in out)
    assert all(display_width(line) <= 80 for line in out.splitlines())
    assert "\\x1b[2J" in out


@pytest.mark.parametrize("more", [*VIEWS, ["--case", f"{HOSTILE}c99"]])
def test_nothing_hostile_reaches_a_terminal(hostile: Path, terminal: tuple[int, Any], more: list[str]) -> None:
    width, screen = terminal
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        code = main([str(hostile), *more])
    out = screen.getvalue()
    assert code == (2 if more[1:] == [f"{HOSTILE}c99"] else 0)
    assert all(c.isprintable() or c == "\n" for c in out)
    assert code == 2 or all(display_width(line) <= width for line in out.splitlines())


@pytest.mark.parametrize("more", VIEWS)
def test_a_terminal_gets_its_own_width(rich: Path, terminal: tuple[int, Any], more: list[str]) -> None:
    width, screen = terminal
    with contextlib.redirect_stdout(screen):
        assert main([str(rich), *more]) == 0
    lines = screen.getvalue().splitlines()
    assert all(display_width(line) <= width for line in lines)
    if len(more) == 4:
        assert {line.split()[-1] for line in lines if line.split()[:2] == ["#", "token"]} == {"loss"}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_token_table_is_no_wider_than_its_longest_token(width: int) -> None:
    values = dict.fromkeys(("logprob", "ref_logprob", "ratio", "kl"), -0.5)
    rows = [
        {"epoch": 1, "position": i, "id": i, "token": text, "clip": None, "loss": 1e-3} | values
        for i, text in enumerate(("a", "intubated" * 9, " on"))
    ]
    _, _, head, *body = token_lines(rows, width)
    assert head.split() == ["#", "token", "logprob", "ref", "ratio", "KL", "clip", "loss"]
    assert {display_width(line) for line in (head, *body)} == {min(width, 81 + 46)}
    assert all(text in line for text, line in zip(("a", "intubated", "·on"), body, strict=True))


def test_columns_in_the_environment_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, wanted in (("132", 132), ("20", 60), ("0", 80), ("wide", 80), ("", 80)):
        monkeypatch.setenv("COLUMNS", asked)
        assert screen_width() == wanted


def test_a_terminal_is_never_narrower_than_60_and_a_file_has_80(terminal: tuple[int, Any]) -> None:
    width, screen = terminal
    assert screen_width() == max(60, width)
    fcntl.ioctl(screen.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    assert screen_width() == 60
    fcntl.ioctl(screen.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    assert screen_width() == 80


@given(st.text(alphabet=st.characters(), max_size=60), st.integers(2, 30))
@example("日本" * 9, 5)
@example("a\u0301" * 9, 2)
@example("  two   blanks  ", 6)
def test_wrapped_lines_fit_and_lose_nothing_but_blanks(text: str, width: int) -> None:
    lines = list(wrap(text, width))
    # an escape is longer than the letter it stands for, and may be broken
    assert all(display_width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(escape_control(line) for line in text.split("\n")).replace(
        " ", ""
    )
    assert all(c.isprintable() for line in lines for c in line)
    assert display_width(pad_or_truncate(escape_control(text), width)) == width


# --- what is kept out, and what is not there ---------------------------------------------------------------


@pytest.mark.parametrize("text", ["redacted", "off"])
def test_what_was_not_written_is_a_dash_with_its_reason(rich: Path, tmp_path: Path, text: str) -> None:
    run = rewritten(rich, tmp_path / "run", text=text)
    entry = read_step(rich / "ledger", 1)
    for more in (["--case", "#0"], ["--case", "#0", "--member", "1"]):
        out = shown(run, "--step", "1", *more)
        assert f'(ledger.text = "{text}")' in " ".join(out.splitlines()[-2:]) and "\n—\n" in out
        assert "ANSWER" not in out and entry.step.groups[0].prompt.case.text.split(",")[0] not in out
    (group,) = record(run, "--step", "1", "--case", "#0", "--member", "1")["groups"]
    (member,) = group["completions"]
    assert group["case_text"] is None and member["text"] is None
    assert all(token["id"] is None and token["token"] is None for token in member["token_terms"])
    assert member["reward"] == entry.step.scores[0][1].total
    assert (member["fired"] is None) == (member["reason"] is None) == (text == "off")
    assert (group["case"] is None) == (text == "off")
    assert ("\n0 — " in shown(run, "--step", "1")) == (text == "off")


def test_without_the_tokenizer_ids_are_shown_and_why(rich: Path, tmp_path: Path) -> None:
    run = shutil.copytree(rich, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["config"]["model"]["name"] = "nobody/nothing"
    (run / "config.json").write_text(json.dumps(config))
    out = shown(run, "--case", "#0", "--member", "0")
    first = read_step(run / "ledger", 3).step.groups[0].completions[0].ids[0]
    assert f"\n 0 #{first} " in out
    assert "no tokenizer of nobody/nothing on this machine" in out.splitlines()[-1]


def test_numbers_that_are_none_stay_json(rich: Path, tmp_path: Path) -> None:
    def spoil(entry: LedgerStep) -> LedgerStep:
        logprobs = entry.step.logprobs.logprobs.clone()
        logprobs[0, 0] = -math.inf
        tokens = dataclasses.replace(entry.step.logprobs, logprobs=logprobs, ref_logprobs=None)
        account = dataclasses.replace(entry.account, kl=None)
        return dataclasses.replace(entry, step=dataclasses.replace(entry.step, logprobs=tokens), account=account)

    run = rewritten(rich, tmp_path / "run", spoil, step=3)
    (group,) = record(run, "--case", "#0", "--member", "0")["groups"]
    token = group["completions"][0]["token_terms"][0]
    assert token["logprob"] is None and token["ref_logprob"] is None and token["kl"] is None
    assert re.search(r"^ +0 .* — .* — .* —", shown(run, "--case", "#0", "--member", "0"), re.MULTILINE)


def test_a_changed_ledger_says_so(rich: Path, tmp_path: Path) -> None:
    run = shutil.copytree(rich, tmp_path / "run")
    file = run / "ledger" / "step_000003.jsonl"
    file.write_text(file.read_text().replace("ANSWER: ESI 3", "ANSWER: ESI 1", 1))
    assert shown(run).endswith("changed since it was written: ledger/step_000003.jsonl\n")
    assert record(run)["changed"] == ["ledger/step_000003.jsonl"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--step", "9"], "no step 9 in this ledger: it has steps 1 to 3"),
        (["--case", "c77"], "no case 'c77'; the cases of this step are c"),
        (["--case", "#7"], "no case '#7'; the cases of this step are c"),
        (["--case", "#0", "--member", "4"], "no member 4 in this group, whose members are 0 to 3"),
        (["--case", "#0", "--member", "-1"], "no member -1"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(plain: Path, more: list[str], says: str) -> None:
    code, out, err = look(plain, *more)
    assert (code, out) == (2, "") and says in err and err.startswith("error: ") and err.count("\n") == 1
    assert says in json.loads(look(plain, *more, "--json")[1])["error"]


def test_a_missing_run_or_ledger_is_exit_code_2(plain: Path, tmp_path: Path) -> None:
    assert "not a run folder" in look(tmp_path / "nowhere")[2]
    run = shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(run / "ledger")
    assert look(run)[0] == 2 and "no ledger in this run" in look(run)[2]
    assert look(plain, "--member", "0") == (2, "", "error: --member needs --case\n")


def test_letters_are_as_wide_as_a_terminal_makes_them() -> None:
    assert [display_width(text) for text in ("", "a", "日", "\uff21", "a\u0301", "\u20dd")] == [0, 1, 2, 2, 1, 0]


def test_a_group_with_one_completion_in_its_baseline_has_no_advantage(plain: Path) -> None:
    entry = read_step(plain / "ledger", 2)
    config = read_header(plain).config
    assert [group["zero_variance"] for group in step_record(entry, config)["groups"]] == [True, False]
    alone = entry.step.batch.baseline_mask.clone()
    alone[5:] = False
    batch = dataclasses.replace(entry.step.batch, baseline_mask=alone)
    entry = dataclasses.replace(entry, step=dataclasses.replace(entry.step, batch=batch))
    assert [group["zero_variance"] for group in step_record(entry, config)["groups"]] == [True, True]


def test_large_groups_are_truncated(plain: Path) -> None:
    entry = read_step(plain / "ledger", 2)
    groups = tuple(dataclasses.replace(g, completions=g.completions * 25) for g in entry.step.groups)
    scores = tuple(row * 25 for row in entry.step.scores)
    entry = dataclasses.replace(entry, step=dataclasses.replace(entry.step, groups=groups, scores=scores))
    record = step_record(entry, read_header(plain).config)
    assert max(map(display_width, step_lines(record, 80))) == 80
