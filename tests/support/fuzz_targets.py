"""What fuzzing throws at every reader: valid files, changed a little or a lot, and what may come of it.

A target takes bytes and either is content or raises one of the project's own named errors. Whatever else comes out is a
fault of ours. Mutations know what they change: bytes, lines, values of JSON and TOML, headers of safetensors; where a
file is held against a sha256, half of the mutants get theirs written anew, or nothing behind it would ever be met.
"""

import functools
import hashlib
import json
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.cases import load_cases
from grpo.config import TINY_WORLD_DIR, CheckpointSection, LoraSection, ModelSection, key_comments, load_config
from grpo.evaluation.answers import read_answers
from grpo.evaluation.comparison import EVAL_FORMAT, check_same_cases, compare, read_evaluation
from grpo.evaluation.records import before_after_table
from grpo.inspection import run_reader as recording
from grpo.inspection.replay import folder_differences, replay, replay_lines
from grpo.inspection.step_records import find_groups, group_record, step_record, token_records
from grpo.inspection.step_text import group_lines, step_lines
from grpo.policy.adapter_files import check_lora_tensors, read_adapter_config
from grpo.policy.policy import Policy, load_policy
from grpo.report.model_card import model_card
from grpo.report.page import make_report
from grpo.run.checkpoint import (
    CHECKPOINT_FILES,
    MANIFEST,
    Progress,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from grpo.run.folder import RunFolder, read_evaluations
from grpo.run.ledger import read_step
from grpo.runtime.errors import INPUT_ERRORS, UserError
from rewards import RewardError, load_reward, parse_answer
from rewards.parse import FORMATS
from tests.report.test_report import add_evaluations, evaluation, record_run

ROOT = Path(__file__).parents[2]
WIDTH = 80
HOSTILE: tuple[Any, ...] = (
    0, -1, 1, 2, 2**31, 2**62, 2**63, 10**30, -(2**31), 1e999, -1e308, 5e-324, 1e100, float("nan"), True, False, None,
    "", [], {}, "../../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "\u202e", "<script>", "{{7*7}}", "%s%n",
    "9" * 5000, "a" * 70_000, ["x"] * 50, [[[[1]]]], {"a": {"b": {"c": 1}}}, "2024-01-01T00:00:00Z", "1", "full", "on",
    [0, 1], [-1, 10**9], [0.5, 2],
)  # fmt: skip
TOKENS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n", b'"', b"'", b'"""', b"[[", b"]]", b"{", b"}",
    b",", b":", b"=", b"#",
    b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"-1", b"0", b"nan", b"inf", b"true", b"null", b"<|im_end|>", b"<think>",
    b"</think>", b"ANSWER: ESI ", b"ESI 2 or ", b"(?:a+)+b", b"{number}", b"(?R)", b"a{1000}{1000}", b"[" * 300,
    b'{"a":' * 200, b"a." * 300,
    b"1" * 5000, b"\x1b[2J", "\u202e".encode(), "\u2028".encode(), b"../", b"/dev/zero",
)  # fmt: skip
TOML_VALUES = (
    "0", "-1", "1e999", "nan", "-inf", "true", '""', "[]", "{}", "9" * 5000, "0x" + "f" * 400, "1979-05-27",
    "[[[[1]]]]", '"\\u0000"', '"../x"', '"embedded:../../x"', '"(a+)+$"', '"(((a{900}){900}){900})"',
    '"' + "x" * 9000 + '"', "{a.b.c = 1}", '["a", 1]', "'''\n'''",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One reader under attack."""

    seeds: Callable[[], list[bytes]]
    """Valid inputs."""
    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    """The named errors that may come out."""
    head: int = 0
    """The first so many bytes choose among files, and stay as they are."""

    def mutated(self, data: bytes, rng: random.Random) -> bytes:
        """The bytes after one to four mutations, of which each changes something."""
        head, data = data[: self.head], data[self.head :]
        seeds = _headless(self)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            before, data = data, rng.choice(MUTATIONS)(data, rng, seeds)
            if data == before:
                data = _bytes(data, rng, seeds)
        return head + data[:LONGEST]


@functools.cache
def _headless(target: Target) -> list[bytes]:
    return [seed[target.head :] for seed in target.seeds()]


LONGEST = 1 << 16
"""Bytes of a mutant; what is longer is cut."""


def _bytes(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    at, size = rng.randint(0, len(data)), rng.choice((1, 1, 2, 8, 64))
    other = rng.choice(seeds)
    start = rng.randint(0, len(other))
    return rng.choice((
        data[:at] + bytes(rng.randrange(256) for _ in range(size)) + data[at + size :],
        data[:at] + data[at + size :],
        data[:at] + data[max(0, at - size) : at] * rng.choice((1, 2, 50)) + data[at:],
        data[:at] + rng.choice(TOKENS) + data[at:],
        data[:at] + rng.choice(TOKENS) + data[at + size :],
        data[:at] + other[start : start + rng.choice((8, 200))] + data[at:],
        data[:at],
    ))  # fmt: skip


def _lines(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif change == 1:
        del lines[i]
    elif change == 2:
        lines.insert(i, lines[j])
    else:
        lines[i] = _bytes(lines[i], rng, seeds)
    return b"".join(lines)


def _json(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    """A value somewhere in the JSON (the whole, or one line of it) replaced, removed or doubled."""
    lines = [data] if data.lstrip()[:1] in b"{[" and _parsed(data) is not None else data.splitlines(keepends=True)
    for i in rng.sample(range(len(lines)), len(lines)) if lines else ():
        if (value := _parsed(lines[i])) is not None:
            end = b"\n" if lines[i].endswith(b"\n") else b""
            lines[i] = _written(_changed(value, rng), rng) + end
            break
    return b"".join(lines)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _written(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value)
    if not rng.randrange(8) and (key := re.search(r'"[a-z_]+": ', text)):  # the same key twice
        text = text.replace(key[0], f"{key[0]}0, {key[0]}", 1)
    return text.encode()


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict | list) and value and rng.randrange(6):
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if not rng.randrange(6):
            del copy[key]
        elif isinstance(value, dict) and not rng.randrange(10):
            copy[str(rng.choice(HOSTILE))[:100]] = copy.pop(key)
        else:
            copy[key] = _changed(copy[key], rng)
        return copy
    return rng.choice(HOSTILE)


def _toml(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    places = list(re.finditer(rb"(?m)^([ \t]*+[\w.\"-]++[ \t]*+=[ \t]*+)(.++)$", data))
    if not places:
        return _bytes(data, rng, seeds)
    place = rng.choice(places)
    value = rng.choice(TOML_VALUES).encode() if rng.randrange(3) else rng.choice(places)[2]
    return data[: place.start(2)] + value + data[place.end(2) :]


def _tensors(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    """The header of a safetensors file changed, and its length written to fit, or to lie."""
    length = int.from_bytes(data[:8], "little")
    if not 8 <= length < len(data) or (header := _parsed(data[8 : 8 + length])) is None:
        return _bytes(data, rng, seeds)
    changed = _written(_changed(header, rng), rng)
    told = len(changed) if rng.randrange(5) else rng.choice((0, 2**62, len(changed) + 7, 2**64 - 1))
    return struct.pack("<Q", told) + changed + data[8 + length :]


MUTATIONS = (_bytes, _bytes, _lines, _json, _json, _json, _toml, _toml, _tensors)


# --- the files -------------------------------------------------------------------------------------------------------


@functools.cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _scratch() / name
    path.write_bytes(data)
    return path


def _shipped(*patterns: str) -> list[bytes]:
    return [file.read_bytes() for pattern in patterns for file in sorted(ROOT.glob(pattern))]


def _config(data: bytes) -> None:
    path = _file("config.toml", data)
    try:
        config, source = load_config(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 50_000
        key_comments(data.decode("utf-8", "replace"))
        raise
    key_comments(source.text)
    json.dumps(config.model_dump(mode="json"), allow_nan=False)


def _cases_of(loader: str, name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        loaded = load_cases(loader, str(_file(name, data)), strict=False)
        for record in loaded.rows:
            assert record.case.id.isprintable() and 1 <= record.case.gold_level <= 5 and record.case.text.strip()
            json.dumps([record.case.text, record.case.tags], ensure_ascii=False).encode()
        assert loaded.row_count == len(loaded.rows) + loaded.dropped

    return read


MIMIC = {
    "triage.csv": b"subject_id,stay_id,temperature,heartrate,resprate,o2sat,sbp,dbp,pain,acuity,chiefcomplaint\n"
    b'1,11,98.6,104,18,97,132,84,8,2,"CHEST PAIN, transfer"\n2,12,,,,,,,,3,___ rash\n',
    "edstays.csv": b"subject_id,hadm_id,stay_id,intime,outtime,gender,race,arrival_transport,disposition\n"
    b"1,,11,2180-05-06 19:17:00,,F,X,AMBULANCE,HOME\n2,,12,2180-06-06 19:17:00,,M,X,WALK IN,HOME\n",
    "patients.csv": b"subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod\n"
    b"1,F,52,2180,2014,\n2,M,91,2181,2014,\n",
}
MIETIC = (
    b"subject_id,stay_id,temperature,heartrate,resprate,o2sat,sbp,dbp,acuity,tiragecase,Final Decision\n"
    b'1,2,98,88,18,97,120,80,2,"A man, 54, chest pain.",RETAIN\n3,4,98,88,18,97,120,80,3,Cut finger.,DROP\n'
)


def _mimic(data: bytes) -> None:
    """The first byte says which of the three files the rest is."""
    folder = _scratch() / "mimic"
    folder.mkdir(exist_ok=True)
    for name, content in MIMIC.items():
        (folder / name).write_bytes(content)
    name = list(MIMIC)[(data or b"\0")[0] % 3]
    (folder / name).write_bytes(data[1:])
    for record in load_cases("mimic-iv-ed", str(folder), strict=False).rows:
        assert record.case.text.isprintable() and 1 <= record.case.gold_level <= 5


def _reward(suffix: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        if b"function" in data:  # a set with rules of code is trusted like code, and imports what it names
            return
        reward = load_reward(_file(f"set.{suffix}", data))
        score = reward.score(text="Arrived intubated, pain 9/10. " * 20, gold=1, completion="ANSWER: ESI 2",
                             thinking=False, finished=True, case_id="a")  # fmt: skip
        assert abs(score.total) <= 1e8

    return read


def _parser(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for thinking in (True, False):
        answer = parse_answer(text, thinking=thinking)
        assert (answer.level is not None) == (answer.reason == "parsed")
        assert answer.level in (None, 1, 2, 3, 4, 5)
        if answer.span:
            assert 0 <= answer.span[0] < answer.span[1] <= len(text)


@functools.cache
def _run() -> Path:
    """A whole run, made once: config, reward, metrics, evaluations, answers, ledger."""
    folder = record_run(_scratch() / "run", steps=2)
    add_evaluations(folder, *(evaluation(step, mode, 9 + step) for step in (0, 2) for mode in ("on", "off")))
    return folder


def _names() -> list[str]:
    run = _run()
    return sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())


def _run_seeds() -> list[bytes]:
    return [bytes([i, again]) + (_run() / name).read_bytes() for i, name in enumerate(_names()) for again in (0, 1)]


def _altered(data: bytes) -> Path:
    """A copy of the run in which one file is other bytes; the second byte says whether the index is written to fit."""
    copy, names = _scratch() / "copy", _names()
    if not copy.exists():
        shutil.copytree(_run(), copy)
    which, again = (*data[:2], 0, 0)[:2]
    name = names[which % len(names)]
    (copy / name).write_bytes(data[2:])
    if again % 2 and name.startswith("ledger/step_"):
        index = copy / "ledger" / "index.jsonl"
        lines = [json.loads(line) for line in (_run() / "ledger" / "index.jsonl").read_text().splitlines()]
        for line in lines:
            line["files"] |= {
                file: hashlib.sha256((copy / "ledger" / file).read_bytes()).hexdigest() for file in line["files"]
            }
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def _put_back(data: bytes) -> None:
    names = _names()
    for name in (names[(data or b"\0")[0] % len(names)], "ledger/index.jsonl"):
        shutil.copyfile(_run() / name, _scratch() / "copy" / name)


def _on_altered_run(read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def attacked(data: bytes) -> None:
        try:
            read(_altered(data))
        finally:
            _put_back(data)

    return attacked


def _ledger(run: Path) -> None:
    """All that `grpo inspect` shows of the two steps."""
    config = recording.read_header(run).config
    for number in (1, 2):
        entry = read_step(run / "ledger", number)
        whole = step_record(entry, config)
        lines = [*step_lines(whole, WIDTH)]
        for b in range(len(entry.step.groups)):
            record = group_record(entry, config, b)
            for g, member in enumerate(record["completions"]):
                member["token_terms"] = token_records(entry, b, g, None)
            lines += [*group_lines(record, WIDTH)]
            json.dumps(record, allow_nan=False)
        for line in lines:
            assert line.isprintable(), "something that a terminal obeys"
        json.dumps(whole, allow_nan=False)
        find_groups(entry, "#0")


def _replay(run: Path) -> None:
    read = recording.read_recorded_run(run)
    replayed = replay(read, read.steps)
    json.dumps(replay_lines(read, replayed, [*folder_differences(read), *replayed.differences]))


def _report(run: Path) -> None:
    page = make_report((run,), groups=1, text=True, max_bytes=3_000_000).html.decode()
    assert page.count("<script") == 0


def _card(run: Path) -> None:
    card = model_card(run)
    assert "<script" not in card and "\x1b" not in card
    before_after_table(read_evaluations(RunFolder(run)))


@functools.cache
def _cases() -> tuple[Any, ...]:
    return load_cases("jsonl", str(TINY_WORLD_DIR / "cases" / "validation.jsonl"), strict=True).cases[:3]


def _answers(data: bytes) -> None:
    read_answers(_file("answers.jsonl", data), _cases(), 2, thinking=False, formats=tuple(FORMATS))


def _answer_seeds() -> list[bytes]:
    rows = [
        {"id": case.id, "sample": k, "esi": case.gold_level, "predicted": 2, "reason": "parsed", "finished": True,
         "tokens": 9, "completion": "ANSWER: ESI 2"}
        for case in _cases() for k in (0, 1)
    ]  # fmt: skip
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def _evaluation(data: bytes) -> None:
    path = _file("eval.json", data)
    before = read_evaluation(path)
    check_same_cases({"test": _cases()}, before, path)
    for told in before.cases.values():
        compare(told, told, "on")


def _evaluation_seeds() -> list[bytes]:
    cases = [
        {
            "id": c.id,
            "esi": c.gold_level,
            "sha256": hashlib.sha256(c.text.encode()).hexdigest(),
            "levels": {"on": [1, None]},
        }
        for c in _cases()
    ]
    return [json.dumps({"format": EVAL_FORMAT, "settings": {"samples": 1}, "cases": {"test": cases}}).encode()]


def _adapter(data: bytes) -> None:
    """The first byte says which of the two files the rest is."""
    folder = _scratch() / "adapter"
    if not folder.exists():
        shutil.copytree(TINY_WORLD_DIR / "v46", folder)
    name = ADAPTER[(data or b"\0")[0] % 2]
    (folder / name).write_bytes(data[1:])
    try:
        check_lora_tensors(folder, read_adapter_config(folder))
    finally:
        shutil.copyfile(TINY_WORLD_DIR / "v46" / name, folder / name)


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def _adapter_seeds() -> list[bytes]:
    from safetensors.torch import load_file, save

    small = {
        k: v[:, :4] if "lora_A" in k else v[:4]
        for k, v in list(load_file(TINY_WORLD_DIR / "v46" / ADAPTER[1]).items())[:4]
    }
    weights = save({name: tensor.contiguous() for name, tensor in small.items()})
    return [b"\0" + (TINY_WORLD_DIR / "v46" / ADAPTER[0]).read_bytes(), b"\1" + weights]


@functools.cache
def _policy() -> tuple[Policy, torch.optim.Optimizer]:
    """A small adapter, and AdamW after one step of it."""
    model = ModelSection(name="embedded:base", device="cpu", dtype="float32", gradient_checkpointing=False)
    lora = LoraSection(r=2, alpha=4.0, dropout=0.0, target_modules=("v_proj",), warm_start="")
    policy = load_policy(model, lora, seed=1)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-3)
    for p in policy.adapter_parameters().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return policy, optimizer


CHECKPOINT = (*CHECKPOINT_FILES, MANIFEST)


@functools.cache
def _saved() -> Path:
    folder = _scratch() / "saved"
    save_checkpoint(folder, *_policy(), Progress(3, 1), CheckpointSection(every=1, keep=1))
    return folder / "step_000003"


def _checkpoint_seeds() -> list[bytes]:
    return [bytes([i, again]) + (_saved() / name).read_bytes() for i, name in enumerate(CHECKPOINT) for again in (0, 1)]


def _checkpoint(data: bytes) -> None:
    """The first byte says which file the rest is, the second whether the manifest is written to fit."""
    which, again = (*data[:2], 0, 0)[:2]
    name, copy = CHECKPOINT[which % len(CHECKPOINT)], _scratch() / "checkpoints" / "step_000003"
    if not copy.exists():
        shutil.copytree(_saved(), copy)
    (copy / name).write_bytes(data[2:])
    if again % 2 and name != MANIFEST:
        manifest = json.loads((copy / MANIFEST).read_bytes())
        manifest["files"][name] = {"bytes": len(data) - 2, "sha256": hashlib.sha256(data[2:]).hexdigest()}
        (copy / MANIFEST).write_text(json.dumps(manifest))
    policy, optimizer = _policy()
    try:
        whole = latest_checkpoint(copy.parent)[0]
        assert whole == copy
        assert load_checkpoint(copy, policy, optimizer).step == 3
        assert len(optimizer.state_dict()["state"]) <= len(policy.adapter_parameters())
    finally:
        for file in (name, MANIFEST):
            shutil.copyfile(_saved() / file, copy / file)


def _jsonl_seeds() -> list[bytes]:
    lines = (TINY_WORLD_DIR / "cases" / "validation.jsonl").read_bytes().splitlines(keepends=True)[:3]
    return [b"".join(lines), b'{"id": "a", "text": "Rash.", "esi": 5, "tags": ["adult"], "patient": 7}\n']


PARSER_SEEDS = [
    b"Looks stable.\n</think>\n\nEXTRACTION:\nChief complaint: fall\nANSWER: ESI 2",
    b"**Final ESI level: 3** because (1) pain 9/10, 2 resources\nESI-2 or 3\n2.",
]
RUN_ERRORS = INPUT_ERRORS
TARGETS: dict[str, Target] = {
    "config": Target(lambda: _shipped("configs/*.toml"), _config, (UserError,)),
    "cases-jsonl": Target(_jsonl_seeds, _cases_of("jsonl", "cases.jsonl"), (UserError,)),
    "cases-mietic": Target(lambda: [MIETIC], _cases_of("mietic-validate", "mietic.csv"), (UserError,)),
    "cases-mimic": Target(
        lambda: [bytes([i]) + content for i, content in enumerate(MIMIC.values())], _mimic, (UserError,), 1
    ),
    "reward": Target(lambda: _shipped("rewards/sets/*.toml"), _reward("toml"), (RewardError,)),
    "reward-json": Target(lambda: [(_run() / "reward.json").read_bytes()], _reward("json"), (RewardError,)),
    "parser": Target(lambda: PARSER_SEEDS, _parser, ()),
    "adapter": Target(_adapter_seeds, _adapter, (UserError,), 1),
    "checkpoint": Target(_checkpoint_seeds, _checkpoint, (UserError,), 2),
    "answers": Target(_answer_seeds, _answers, (UserError,)),
    "evaluation": Target(_evaluation_seeds, _evaluation, (UserError,)),
    "inspect": Target(_run_seeds, _on_altered_run(_ledger), RUN_ERRORS, 2),
    "replay": Target(_run_seeds, _on_altered_run(_replay), RUN_ERRORS, 2),
    "report": Target(_run_seeds, _on_altered_run(_report), RUN_ERRORS, 2),
    "card": Target(_run_seeds, _on_altered_run(_card), RUN_ERRORS, 2),
}
"""Every reader of a file that somebody else may have written."""
