"""Run folders → what a report shows of them. Nothing is computed here, and what is missing becomes a remark."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from grpo.config import MOST, Config, notes
from grpo.runtime.errors import UserError
from rewards.safe_files import (
    MEBIBYTE,
    Unreadable,
    check_contents,
    clipped,
    is_regular,
    parse_json,
    raw_lines,
    read_json,
)

Metrics = dict[str, float | None]
"""One line of ``metrics.jsonl``; None for a figure that was not finite or that nothing was counted for."""
Key = tuple[int, str, str]
"""(step, set, thinking) of an evaluation."""

LARGEST = 1e100
"""No figure of a run lies farther from 0; beyond it the arithmetic of a chart would end."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


Level = Literal["1", "2", "3", "4", "5"]
GOLD: tuple[Level, ...] = get_args(Level)
Rate = Annotated[float, Field(ge=0, le=1)]


class Subset(_Read):
    """Accuracy over part of a set."""

    n: Annotated[int, Field(ge=0)]
    exact: Rate | None


class Evaluation(_Read):
    """A record of ``eval.json``; `grpo.evaluation.metrics.summarise` defines each rate."""

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
    """Gold → counts of predicted 1 … 5 and of no parse."""
    high_acuity_n: Annotated[int, Field(ge=0)] | None = None
    """Cases of ESI 1 and 2, which ``high_acuity_under`` is a share of; None in a record from before it was."""
    intervals: dict[str, tuple[Rate, Rate] | None] = {}
    """Rate → its 95 % interval, where the evaluation says it."""
    qwk: float | None = None
    """Quadratic weighted kappa over the answers that parse."""

    @property
    def key(self) -> Key:
        return self.step, self.cases, self.thinking


class _Source(_Read):
    toml: str
    overrides: tuple[str, ...] = ()


class _Machine(_Read):
    platform: str = ""
    device: str = ""


class _Header(_Read):
    """``config.json``, its ``config`` still unread."""

    config: dict[str, Any]
    source: _Source
    started: AwareDatetime | None = None
    commit: str | None = None
    versions: dict[str, str | None] = {}
    machine: _Machine = _Machine()
    reward: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, read."""

    path: Path
    name: str
    """The config's name; beside a run of the same name, the folder's."""
    config: Config
    notes: dict[str, str]
    """The comments of the config's file by dotted key."""
    overrides: dict[str, str]
    """Values laid over the file with ``--set``, by dotted key."""
    commit: str | None
    versions: dict[str, str]
    platform: str
    device: str
    reward: dict[str, str]
    """Name and sha256 of the reward."""
    reward_set: dict[str, Any]
    """``reward.json``; empty where there is none."""
    metrics: tuple[Metrics, ...]
    """By step."""
    evaluations: tuple[Evaluation, ...]
    """By step, sets in the config's order."""
    right: dict[Key, dict[tuple[str, int], bool]]
    """Evaluation → (case id, sample) → exact; only where its answers are there."""
    started: float | None
    """Seconds since the epoch, as ``config.json`` says it; None where it does not. The files' own dates are those of
    the last copy, so nothing is read off them: neither when a run ended, nor whether it is still going."""
    remarks: tuple[str, ...]
    """What is not there, in sentences."""


def read_run(path: Path) -> RunRecord:
    """What a run folder holds: a function of the contents of its files.

    No metrics, no evaluation, a torn last line: each is a remark, not an error.

    Raises:
        UserError: no run folder, or a file in it that is not what `grpo.train` writes.
    """
    header, config = _read_header(path)
    remarks: list[str] = []
    metrics = _read_metrics(path / "metrics.jsonl", remarks)
    evaluations = _read_evaluations(path / "eval.json", config)
    right = {
        e.key: _read_answers(path / "eval" / f"step_{e.step:06d}_{e.cases}_{e.thinking}.jsonl") for e in evaluations
    }
    done = int(metrics[-1]["step"] or 0) if metrics else 0
    remarks += _missing(config, done=done, evaluations=evaluations)
    return RunRecord(
        path=path,
        name=config.name,
        config=config,
        notes=notes(header.source.toml),
        overrides=dict(_override(text) for text in header.source.overrides),
        commit=header.commit,
        versions={name: version for name, version in header.versions.items() if version},
        platform=header.machine.platform,
        device=header.machine.device,
        reward=header.reward,
        reward_set=_read_reward(path / "reward.json"),
        metrics=metrics,
        evaluations=evaluations,
        right={key: answers for key, answers in right.items() if answers},
        started=header.started.timestamp() if header.started else None,
        remarks=tuple(remarks),
    )


def distinct_names(paths: Sequence[Path], names: Sequence[str]) -> tuple[str, ...]:
    """A name a run: its own, its folder's where two runs share one, and a number where that is shared too.

    >>> distinct_names([Path("a/x"), Path("a/y"), Path("b/y"), Path("z")], ["tiny", "tiny", "tiny", "v49"])
    ('x', 'y', 'y (2)', 'v49')
    """
    shown: list[str] = []
    for path, name in zip(paths, names, strict=True):
        base = name if names.count(name) == 1 else path.resolve().name
        again = sum(taken == base or taken.startswith(f"{base} (") for taken in shown)
        shown.append(f"{base} ({again + 1})" if again else base)
    return tuple(shown)


def _read_header(path: Path) -> tuple[_Header, Config]:
    file = path / "config.json"
    if not is_regular(file):
        what = "it holds no config.json" if path.is_dir() else "no such folder"
        raise UserError(f"{path}: not a run folder: {what}; expected what `python -m grpo.train` leaves, runs/NAME")
    try:
        check_contents(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    try:
        header = _Header.model_validate(_read_json(file))
        return header, Config.model_validate(header.config)
    except ValidationError as error:
        raise UserError(f"{file}: {_first_fault(error)}; not a config.json that this program reads") from None


def _read_metrics(file: Path, remarks: list[str]) -> tuple[Metrics, ...]:
    if not is_regular(file):
        return ()
    by_step: dict[float, Metrics] = {}
    for number, line in enumerate(_raw_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = _metrics_row(parse_json(line))
        except ValueError as error:
            if not line.endswith(b"\n"):
                remarks.append("The last line of metrics.jsonl is torn, as a crash leaves it; its step is left out.")
                break
            raise UserError(
                f"{file}:{number}: not a line of metrics: {error}; expected an object of numbers with a step"
            ) from None
        by_step[row["step"] or 0] = row
    return tuple(by_step[step] for step in sorted(by_step))


def _metrics_row(value: object) -> Metrics:
    """Numbers and nulls; what is not finite, or beyond `LARGEST`, is None.

    >>> _metrics_row({"step": 1, "loss": float("nan"), "grad_norm": 1e300, "note": "x"})
    {'step': 1, 'loss': None, 'grad_norm': None}
    """
    if not isinstance(value, dict) or type(value.get("step")) is not int or not 0 <= value["step"] <= MOST:
        raise ValueError("no step")
    numbers = {k: v for k, v in value.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))}
    return {k: v if v is not None and math.isfinite(v) and abs(v) <= LARGEST else None for k, v in numbers.items()}


def _read_evaluations(file: Path, config: Config) -> tuple[Evaluation, ...]:
    if not is_regular(file):
        return ()
    try:
        records = TypeAdapter(list[Evaluation]).validate_python(_read_json(file))
    except ValidationError as error:
        raise UserError(f"{file}: {_first_fault(error)}; not an eval.json that this program reads") from None
    order = [*config.evaluate.ends, *config.evaluate.during]
    order += sorted({record.cases for record in records} - set(order))
    kept = {record.key: record for record in records}
    return tuple(sorted(kept.values(), key=lambda e: (e.step, order.index(e.cases), e.thinking == "off")))


def _read_answers(file: Path) -> dict[tuple[str, int], bool]:
    """(Case id, sample) → exact; nothing where the file is not there or is not whole."""
    if not is_regular(file):
        return {}
    right: dict[tuple[str, int], bool] = {}
    for line in _raw_lines(file, longest=64 * MEBIBYTE):
        try:
            answer = parse_json(line)
            right[str(answer["id"]), int(answer.get("sample", 0))] = bool(answer["predicted"] == answer["esi"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}
    return right


def _read_reward(file: Path) -> dict[str, Any]:
    value = _read_json(file) if is_regular(file) else {}
    return value if isinstance(value, dict) else {}


def _missing(config: Config, *, done: int, evaluations: Sequence[Evaluation]) -> list[str]:
    remarks = []
    if done == 0:
        remarks.append("No step is done yet: there are no training curves.")
    elif done < config.train.steps:
        remarks.append(f"The run is not finished, or was not when it was copied: {done} of {config.train.steps} steps.")
    if not evaluations:
        remarks.append("There is no evaluation yet.")
    elif {e.step for e in evaluations} == {0}:
        remarks.append("There is no evaluation after training yet: only the warm start was evaluated.")
    return remarks


def _override(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.strip(), value.strip()


def _first_fault(error: ValidationError) -> str:
    """Where and what, without the value: it may be a case's."""
    fault = error.errors(include_input=False, include_url=False)[0]
    where = clipped(".".join(str(part) for part in fault["loc"]) or "the file", 200)[1:-1]
    return f"{where}: {fault['msg'][:300]}"


def _read_json(file: Path) -> Any:
    try:
        return read_json(file, most=64 * MEBIBYTE)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None


def _raw_lines(file: Path, *, longest: int = MEBIBYTE) -> Iterator[bytes]:
    try:
        yield from raw_lines(file, longest=longest)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
