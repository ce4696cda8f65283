"""A run folder read back: its config, its reward, what `metrics.jsonl` says and which steps its ledger holds."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo.config import Config
from grpo.run.folder import Run
from grpo.run.ledger import ledger_steps
from grpo.runtime.errors import UserError
from rewards import Reward, load_reward
from rewards.safe_files import Unreadable, check_contents, is_regular, parse_json, raw_lines, read_json


@dataclass(frozen=True, slots=True)
class Recording:
    """What a replay starts from. The steps themselves are read one at a time, by `grpo.run.ledger.read_step`."""

    run: Run
    config: Config
    reward: Reward
    """Of ``reward.json``."""
    reward_sha256: str
    """What ``config.json`` says the reward's is."""
    logged: Mapping[int, Mapping[str, Any]]
    """``metrics.jsonl`` by step."""
    steps: tuple[int, ...]
    """Of the ledger, in order."""
    made_with: Mapping[str, str | None]
    """Versions and machine of the training."""


def read_recording(path: Path) -> Recording:
    """Everything of a run folder but its steps.

    Raises:
        UserError, RewardError: a part that is missing or cannot be read; each names its file.
    """
    config, record = read_config(path)
    run = Run(path)
    try:
        reward_sha256 = str(record["reward"]["sha256"])
        made_with = {**record["versions"], **record["machine"]}
    except (KeyError, TypeError):
        raise UserError(
            f"{path / 'config.json'}: holds no reward, versions or machine: not one of this program's"
        ) from None
    return Recording(
        run=run,
        config=config,
        reward=load_reward(path / "reward.json"),
        reward_sha256=reward_sha256,
        logged=dict(read_metrics(run.metrics)),
        steps=ledger_steps(run.ledger),
        made_with=made_with,
    )


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run folder, and all of its ``config.json``. Raises `UserError`."""
    file = path / "config.json"
    if not is_regular(file):
        raise UserError(f"{path}: no run here: a run folder holds config.json")
    try:
        check_contents(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    try:
        record = read_json(file)
        return Config.model_validate(record["config"]), record
    except Unreadable as error:
        raise UserError(f"{file}: cannot be read: {str(error).removeprefix('cannot be read: ')}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: not a config of this version: {key}: {first['msg']}") from None
    except (KeyError, TypeError):
        raise UserError(f"{file}: cannot be read: holds no config") from None


def read_metrics(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, line) of each line of ``metrics.jsonl``; a last line torn by a crash is none.

    Raises:
        UserError: the file is missing, a line is no JSON object with a step, or a step has two lines.
    """
    seen: set[int] = set()
    for number, line in enumerate(whole_lines(file), 1):
        try:
            record = parse_json(line)
            step = record["step"]
        except (Unreadable, KeyError, TypeError):
            step = None
        if step is None and not line.endswith(b"\n"):
            return
        if not isinstance(step, int) or isinstance(step, bool):
            raise UserError(f"{file}:{number}: expected one JSON object with a whole number as its step")
        if step in seen:
            raise UserError(f"{file}:{number}: a second line of step {step}")
        seen.add(step)
        yield step, record


def unindexed_files(ledger: Path, steps: Sequence[int]) -> tuple[str, ...]:
    """Names of step files that the index does not speak of: of a step the training was killed in, or put there."""
    found = ((path.name, re.fullmatch(r"step_(\d{6,})\.(?:safetensors|jsonl)", path.name)) for path in ledger.iterdir())
    return tuple(sorted(name for name, match in found if match and int(match[1]) not in steps))


def rewritten_lines(ledger: Path) -> tuple[int, ...]:
    """Numbers of the lines of ``index.jsonl`` that no run wrote like that, whatever they mean: the index holds the
    sha256 of everything else, and nothing holds its own."""
    found, last = [], 0
    for number, line in enumerate(whole_lines(ledger / "index.jsonl"), 1):
        if not line.endswith(b"\n"):
            break
        entry = json.loads(line)  # `grpo.run.ledger` has read it before
        if (json.dumps(entry) + "\n").encode() != line or entry["step"] <= last:
            found.append(number)
        last = entry["step"]
    return tuple(found)


def torn(file: Path) -> bool:
    """Its last line does not end: a crash, or, in a run that is finished, somebody's hand."""
    last = b"\n"
    for line in whole_lines(file) if is_regular(file) else ():
        last = line
    return not last.endswith(b"\n")


def whole_lines(file: Path) -> Iterator[bytes]:
    """With their ends, as they are: reading as text would turn a carriage return into a newline. Raises `UserError`."""
    try:
        yield from raw_lines(file)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
