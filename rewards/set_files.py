"""Load a reward set: a shipped set, a TOML file that may extend another, or a complete set as JSON.

``extends = "v46"`` starts from that set. Rows replace the parent's rows of the same name entirely, new rows come after
the parent's, ``drop`` removes rows, and any other table replaces the parent's. Cases are not inherited, because their
expected scores may have changed.

After extension, the rows of ``base`` must cover each signed error predicted − gold from −4 to 4 exactly once.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from rewards.safe_files import InvalidFile, parse_json, parse_toml, read_text, shorten
from rewards.schema import Outcome, ResolvedSet, RuleRow, SameRow, SetFile, StrictModel, all_models
from rewards.table import SIGNED_ERRORS
from rewards.types import RewardError

SHIPPED_SETS_DIR = Path(__file__).parent / "sets"
"""Folder of the shipped sets."""
Model = TypeVar("Model", bound=StrictModel)
KNOWN_KEYS = tuple(dict.fromkeys(key for model in all_models() for key in model.model_fields))
"""Every key that may occur in a file."""
MAX_FAULTS_SHOWN = 20
RESERVED_COMPONENTS = ("outcome", "no_parse", "bounds", "overlong", "timeout")
"""Components of every set, which no rule may have as its name."""


def load_set(name_or_path: str | Path) -> tuple[ResolvedSet, Path]:
    """Return the resolved set and its file.

    Args:
        name_or_path: a shipped set's name ("v49"); the path of a set ending in ``.toml``; or a path ending in ``.json``
            to a resolved set, as `rewards.dump_reward` returns it.

    Raises RewardError with file, row and key.
    """
    if str(name_or_path).endswith(".json"):
        path = Path(name_or_path)
        resolved = _validate(ResolvedSet, path, _read(path, parse_json))
    else:
        path = _path(name_or_path, Path())
        resolved = _merge(_extends_chain(path))
    _check(resolved, path)
    return resolved, path


def shipped_sets() -> tuple[str, ...]:
    """Return the names of the shipped sets, sorted."""
    return tuple(sorted(path.stem for path in SHIPPED_SETS_DIR.glob("*.toml")))


def _path(name_or_path: str | Path, beside: Path) -> Path:
    if str(name_or_path).endswith(".toml"):
        return beside / name_or_path
    name = str(name_or_path)
    if name not in shipped_sets():
        raise RewardError(
            f'no reward set "{name}"{_did_you_mean(name, shipped_sets())}; the shipped sets are '
            f"{', '.join(shipped_sets())}, and a file of your own needs a path ending in .toml"
        )
    return SHIPPED_SETS_DIR / f"{name}.toml"


def _extends_chain(path: Path) -> list[tuple[Path, SetFile]]:
    """Return the files from the set itself up to its first ancestor."""
    chain: list[tuple[Path, SetFile]] = []
    seen: set[Path] = set()
    current: Path | None = path
    while current is not None:
        file = _validate(SetFile, current, _read(current, parse_toml))
        if current.resolve() in seen:
            raise RewardError(f'{current}: "extends" leads back to this file; remove one of the links')
        seen.add(current.resolve())
        chain.append((current, file))
        current = _path(file.extends, current.parent) if file.extends else None
    return chain


def _read(path: Path, parse: Callable[[str], object]) -> object:
    try:
        return parse(read_text(path))
    except InvalidFile as error:
        raise RewardError(f"{path}: {error}") from None


def _validate(model: type[Model], path: Path, table: object) -> Model:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        faults = [_fault(path, table, fault["loc"], fault["type"], fault["msg"]) for fault in errors[:MAX_FAULTS_SHOWN]]
        more = [f"{path}: and {len(errors) - MAX_FAULTS_SHOWN:,} more faults"] * (len(errors) > MAX_FAULTS_SHOWN)
        raise RewardError("\n".join([*faults, *more])) from None


def _fault(path: Path, table: object, loc: tuple[int | str, ...], kind: str, message: str) -> str:
    """Format one error: file, row, key and what was expected; never the value, which may be patient data."""
    where, node = "", table
    for step in loc:
        if isinstance(node, list) and isinstance(step, int):
            node = node[step]
            label = node.get("name") if isinstance(node, dict) else None
            where += f"[{step + 1}]" + (f' "{shorten(label)[1:-1]}"' if isinstance(label, str) else "")
        elif step not in ("pattern", "number", "same") or (isinstance(node, dict) and step in node):
            node = node.get(step) if isinstance(node, dict) else None
            where += f"{'.' * bool(where)}{shorten(step)[1:-1] if isinstance(step, str) else step}"
    if kind == "extra_forbidden":
        return f"{path}: {where}: unknown key{_did_you_mean(str(loc[-1])[:80], KNOWN_KEYS)}"
    return f"{path}: {where or 'the file'}: {message.removeprefix('Value error, ')[:500]}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=1, cutoff=0.5)
    return f', did you mean "{close[0]}"?' if close else ""


def _merge(chain: list[tuple[Path, SetFile]]) -> ResolvedSet:
    """Merge the files, starting from the first ancestor."""
    base: dict[str, Outcome] = {}
    rules: dict[str, RuleRow] = {}
    single: dict[str, object] = dict.fromkeys(("pattern_timeout_s", "no_parse", "stacking", "answer", "bounds"))
    for path, file in reversed(chain):
        for name in file.drop:
            if name not in base and name not in rules:
                raise RewardError(f'{path}: drop: there is no row "{name}"{_did_you_mean(name, [*base, *rules])}')
            base.pop(name, None)
            rules.pop(name, None)
        _check_unique_names(path, file.rule)
        base |= file.base
        rules |= {row.name: row for row in file.rule}
        single |= {key: value for key in single if (value := getattr(file, key)) is not None}
    path, file = chain[0]
    missing = [key for key, value in single.items() if value is None and key != "bounds"]
    if missing:
        raise RewardError(f"{path}: expected the keys {', '.join(missing)}, in this file or in the set it extends")
    pieces = {"name": file.name, "about": file.about, "base": base, "rule": tuple(rules.values()), "case": file.case}
    return ResolvedSet.model_validate(pieces | single)


def _check_unique_names(path: Path, rows: Iterable[RuleRow]) -> None:
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise RewardError(f'{path}: rule: two rows have the name "{repeated[0]}"; names must be unique')


def _check(resolved: ResolvedSet, path: Path) -> None:
    """Check the set as a whole: the base table covers each error once, names are unique and allowed."""
    counts = Counter(error for row in resolved.base.values() for error in row.errors)
    for error in SIGNED_ERRORS:
        if counts[error] != 1:
            rows = ", ".join(name for name, row in resolved.base.items() if error in row.errors) or "none"
            raise RewardError(
                f"{path}: base: expected one row for the error predicted - gold = {error}, got {counts[error]} ({rows})"
            )
    _check_unique_names(path, resolved.rule)
    with_trigger = {row.name for row in resolved.rule if row.trigger and not isinstance(row.trigger, SameRow)}
    for row in resolved.rule:
        if isinstance(row.trigger, SameRow) and row.trigger.rule not in with_trigger:
            raise RewardError(
                f'{path}: rule "{row.name}".trigger.rule: no rule "{row.trigger.rule}" has a trigger of its own'
                f"{_did_you_mean(row.trigger.rule, with_trigger)}"
            )
    for row in resolved.rule:
        if row.name in RESERVED_COMPONENTS:
            raise RewardError(
                f'{path}: rule "{row.name}": this name is reserved for a component of every set; choose another'
            )
