"""The reader of run folders: config, metrics, evaluations, answers, and which steps the ledger contains.

`read_recorded_run` is strict, for a replay: every fault is an error. `read_run` is for reports: missing parts become
remarks.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from grpo.config import MAX_COUNT, RENAMED_KEYS, Config, key_comments, upgrade_recorded_config
from grpo.run.folder import RunFolder
from grpo.run.ledger import file_errors, recorded_steps
from grpo.runtime.errors import UserError
from rewards import Reward, load_reward
from rewards.safe_files import MEBIBYTE, check_no_links_out, is_regular, iter_lines, parse_json, read_json, shorten

Metrics = dict[str, float | None]
"""One line of ``metrics.jsonl``; None for a metric that was not finite or had nothing to count."""
Key = tuple[int, str, str]
"""(step, set, thinking) of an evaluation."""
MAX_METRIC = 1e100
"""Metrics beyond ±1e100 are read as None, so that arithmetic on the axes of a chart stays finite."""
Level = Literal["1", "2", "3", "4", "5"]
GOLD: tuple[Level, ...] = get_args(Level)
Rate = Annotated[float, Field(ge=0, le=1)]


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Subset(_Lenient):
    """Accuracy on part of a set."""

    n: Annotated[int, Field(ge=0)]
    exact: Rate | None


class Evaluation(_Lenient):
    """A record of ``eval.json``; `grpo.evaluation.metrics.summarize` defines each rate."""

    step: Annotated[int, Field(ge=0)]
    cases: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    thinking: Literal["on", "off"]
    n: Annotated[int, Field(ge=1)]
    exact: Rate
    adjacent: Rate
    dangerous_under: Rate
    high_acuity_under: Rate | None
    no_parse: Rate
    clipped_ratio: Rate
    mean_length: Annotated[float, Field(ge=0)]
    by_rule: dict[str, Subset]
    by_tag: dict[str, Subset]
    confusion: dict[Level, Annotated[tuple[int, ...], Field(min_length=6, max_length=6)]]
    """Gold level → counts of predicted levels 1 … 5 and of answers that do not parse."""
    high_acuity_n: Annotated[int, Field(ge=0)] | None = None
    """Cases of ESI 1 and 2, the denominator of ``high_acuity_under``; None in records of older versions."""
    intervals: dict[str, tuple[Rate, Rate] | None] = {}
    """Rate → its 95 % interval, if recorded."""
    qwk: float | None = None
    """Quadratic weighted kappa over the answers that parse."""

    @property
    def key(self) -> Key:
        return self.step, self.cases, self.thinking


class _Source(_Lenient):
    toml: str = ""
    overrides: tuple[str, ...] = ()


class RunHeader(_Lenient):
    """The contents of ``config.json``."""

    config: Annotated[Config, BeforeValidator(upgrade_recorded_config)]
    source: _Source = _Source()
    started: AwareDatetime | None = None
    commit: str | None = None
    versions: dict[str, str | None] = {}
    machine: dict[str, str | float | None] = {}
    reward: dict[str, str] = {}
    """Name and sha256."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Everything a replay needs except the steps, which `grpo.run.ledger.read_step` reads one at a time."""

    run: RunFolder
    header: RunHeader
    reward: Reward
    """The reward of ``reward.json``."""
    logged: Mapping[int, Mapping[str, Any]]
    """Step → its line of ``metrics.jsonl``."""
    steps: tuple[int, ...]
    """Recorded steps in order."""

    @property
    def config(self) -> Config:
        return self.header.config

    @property
    def made_with(self) -> dict[str, str | float | None]:
        """Package versions and machine of the training."""
        return {**self.header.versions, **self.header.machine}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that reports show of one run, except its ledger."""

    path: Path
    name: str
    """The name of the config."""
    config: Config
    notes: dict[str, str]
    """Dotted key → its comment in the config file."""
    overrides: dict[str, str]
    """Dotted key → value set with ``--set``."""
    commit: str | None
    versions: dict[str, str]
    platform: str
    device: str
    reward: dict[str, str]
    """Name and sha256 of the reward."""
    reward_set: dict[str, Any]
    """``reward.json``; empty if it is missing."""
    metrics: tuple[Metrics, ...]
    """By step."""
    evaluations: tuple[Evaluation, ...]
    """By step, then in the order of the sets in the config."""
    exact_answers: dict[Key, dict[tuple[str, int], bool]]
    """Evaluation → (case id, sample) → whether the level is exact; only evaluations whose answers are readable."""
    started: float | None
    """Start of the run in seconds since the epoch; None if ``config.json`` has no date. File dates are not used:
    copying changes them."""
    remarks: tuple[str, ...]
    """One sentence for each part that is missing."""


def read_recorded_run(path: Path) -> RecordedRun:
    """Read a run folder for a replay.

    Raises:
        UserError, RewardError: a part is missing or cannot be read.
    """
    header, run = read_header(path), RunFolder(path)
    if "sha256" not in header.reward or not header.versions or not header.machine:
        raise UserError(f"{path / 'config.json'}: contains no reward, versions or machine; not written by `grpo train`")
    lines, _ = _read_metrics(run.metrics)
    logged: dict[int, dict[str, Any]] = {}
    for number, record in lines:
        if record["step"] in logged:
            raise UserError(f"{run.metrics}:{number}: a second line for step {record['step']}")
        logged[record["step"]] = record
    return RecordedRun(run, header, load_reward(path / "reward.json"), logged, recorded_steps(run.ledger))


def read_run(path: Path) -> RunRecord:
    """Read a run folder for a report. Missing metrics, missing evaluations and a torn last line become remarks.

    Raises:
        UserError: not a run folder, or a file in it was not written by `grpo train`.
    """
    header = read_header(path)
    lines, torn = _read_metrics(path / "metrics.jsonl") if is_regular(path / "metrics.jsonl") else ([], False)
    by_step = {line["step"]: _finite_metrics(line) for _, line in lines}
    evaluations = _read_evaluations(path / "eval.json", header.config)
    answers = {
        e.key: _read_answers(path / "eval" / f"step_{e.step:06d}_{e.cases}_{e.thinking}.jsonl") for e in evaluations
    }
    remarks = ["The last line of metrics.jsonl is torn, as after a crash; its step is omitted."] if torn else []
    reward_set = _read_json(path / "reward.json") if is_regular(path / "reward.json") else {}
    overrides = (text.partition("=") for text in header.source.overrides)
    return RunRecord(
        path=path,
        name=header.config.name,
        config=header.config,
        notes={RENAMED_KEYS.get(key, key): note for key, note in key_comments(header.source.toml).items()},
        overrides={RENAMED_KEYS.get(key.strip(), key.strip()): value.strip() for key, _, value in overrides},
        commit=header.commit,
        versions={name: version for name, version in header.versions.items() if version},
        platform=str(header.machine.get("platform", "")),
        device=str(header.machine.get("device", "")),
        reward=header.reward,
        reward_set=reward_set if isinstance(reward_set, dict) else {},
        metrics=tuple(by_step[step] for step in sorted(by_step)),
        evaluations=evaluations,
        exact_answers={key: right for key, right in answers.items() if right},
        started=header.started.timestamp() if header.started else None,
        remarks=(*remarks, *_missing_parts(header.config, max(by_step, default=0), evaluations)),
    )


def read_header(path: Path) -> RunHeader:
    """Read ``config.json`` and check that nothing in the folder leads out of it. Raises `UserError`."""
    file = path / "config.json"
    if not is_regular(file):
        fault = "it holds no config.json" if path.is_dir() else "no such folder"
        raise UserError(f"{path}: not a run folder: {fault}; expected a folder written by `grpo train`, as runs/NAME")
    with file_errors(path):
        check_no_links_out(path)
    try:
        return RunHeader.model_validate(_read_json(file))
    except ValidationError as error:
        fault = _first_error(error).removeprefix("config.")
        raise UserError(f"{file}: {fault}; not a config.json of this version") from None


def distinct_names(paths: Sequence[Path], names: Sequence[str]) -> tuple[str, ...]:
    """Return one name per run: its own, or its folder's if several runs share it, numbered if that is shared too.

    >>> distinct_names([Path("a/x"), Path("a/y"), Path("b/y"), Path("z")], ["tiny", "tiny", "tiny", "v49"])
    ('x', 'y', 'y (2)', 'v49')
    """
    distinct: list[str] = []
    for path, name in zip(paths, names, strict=True):
        base = name if names.count(name) == 1 else path.resolve().name
        earlier = sum(other == base or other.startswith(f"{base} (") for other in distinct)
        distinct.append(f"{base} ({earlier + 1})" if earlier else base)
    return tuple(distinct)


def unindexed_files(ledger: Path, steps: Sequence[int]) -> tuple[str, ...]:
    """Return the step files without an index line: the training was killed in this step, or they were added later."""
    matches = (re.fullmatch(r"step_(\d{6,})\.(?:safetensors|jsonl)", path.name) for path in ledger.iterdir())
    return tuple(sorted(match[0] for match in matches if match and int(match[1]) not in steps))


def _read_metrics(file: Path) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
    """Return (line number, JSON object with a step) of each line, and whether a torn last line was omitted.

    Raises:
        UserError: another line is not a JSON object with a step.
    """
    lines: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(_lines(file), 1):
        if not line.endswith(b"\n"):
            return lines, True
        try:
            record = parse_json(line)
            if (
                not isinstance(record, dict)
                or type(record.get("step")) is not int
                or not 0 <= record["step"] <= MAX_COUNT
            ):
                raise ValueError("no step")
        except ValueError as error:
            raise UserError(
                f"{file}:{number}: not a line of metrics: {error}; expected an object with a step"
            ) from None
        lines.append((number, record))
    return lines, False


def _finite_metrics(line: Mapping[str, Any]) -> Metrics:
    """Keep numbers and nulls; a number that is not finite or exceeds `MAX_METRIC` becomes None.

    >>> _finite_metrics({"step": 1, "loss": float("nan"), "grad_norm": 1e300, "note": "x"})
    {'step': 1, 'loss': None, 'grad_norm': None}
    """
    numbers = {k: v for k, v in line.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))}
    return {k: v if v is not None and math.isfinite(v) and abs(v) <= MAX_METRIC else None for k, v in numbers.items()}


def _read_evaluations(file: Path, config: Config) -> tuple[Evaluation, ...]:
    if not is_regular(file):
        return ()
    try:
        records = TypeAdapter(list[Evaluation]).validate_python(_read_json(file))
    except ValidationError as error:
        raise UserError(f"{file}: {_first_error(error)}; not an eval.json of this version") from None
    order = [*config.evaluate.before_and_after, *config.evaluate.periodic]
    order += sorted({record.cases for record in records} - set(order))
    latest = {record.key: record for record in records}
    return tuple(sorted(latest.values(), key=lambda e: (e.step, order.index(e.cases), e.thinking == "off")))


def _read_answers(file: Path) -> dict[tuple[str, int], bool]:
    """Return (case id, sample) → whether the level is exact; empty if the file is missing or damaged."""
    right: dict[tuple[str, int], bool] = {}
    for line in _lines(file, longest=64 * MEBIBYTE) if is_regular(file) else ():
        try:
            answer = parse_json(line)
            right[str(answer["id"]), int(answer.get("sample", 0))] = bool(answer["predicted"] == answer["esi"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}
    return right


def _missing_parts(config: Config, done: int, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    if done == 0:
        yield "No step is done yet: there are no training curves."
    elif done < config.train.steps:
        yield f"The run is not finished, or was not when it was copied: {done} of {config.train.steps} steps."
    if not evaluations:
        yield "There is no evaluation yet."
    elif {e.step for e in evaluations} == {0}:
        yield "There is no evaluation after training yet: only the warm start was evaluated."


def _first_error(error: ValidationError) -> str:
    """Return key and message of the first error, without the value, which may belong to a case."""
    first = error.errors(include_input=False, include_url=False)[0]
    key = shorten(".".join(str(part) for part in first["loc"]) or "the file", 200)[1:-1]
    return f"{key}: {first['msg'][:300]}"


def _read_json(file: Path) -> Any:
    with file_errors(file):
        return read_json(file, most=64 * MEBIBYTE)


def _lines(file: Path, *, longest: int = MEBIBYTE) -> Iterator[bytes]:
    """Yield the lines as bytes with their ends: text mode would turn a carriage return into a newline."""
    with file_errors(file):
        yield from iter_lines(file, longest=longest)
