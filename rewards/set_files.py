"""Files → one resolved reward set: a shipped set, a TOML file that may extend another, or a whole set as JSON.

``extends = "v46"`` starts from that set. Rows given here replace the parent's rows of the same name whole, new rows
come after the parent's, ``drop`` removes rows, and any other table given replaces the parent's. Cases are not
inherited: what they expect may have changed.

The rows of ``base`` must cover each signed error predicted − gold from −4 to 4 exactly once, after extension.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from rewards.safe_files import Unreadable, clipped, parse_json, parse_toml, read_text
from rewards.schema import MODELS, Outcome, ResolvedSet, RuleRow, SameRow, Section, SetFile
from rewards.table import ERRORS
from rewards.types import RewardError

SETS = Path(__file__).parent / "sets"
"""The shipped sets, package data."""
Checked = TypeVar("Checked", bound=Section)
KEYS = tuple(dict.fromkeys(key for model in MODELS for key in model.model_fields))
"""Every key that a set's file may hold."""
FAULTS_SHOWN = 20
RESERVED = ("outcome", "no_parse", "bounds", "overlong", "timeout")
"""Components of every set: no rule may be called so."""


def load_set(name_or_path: str | Path) -> tuple[ResolvedSet, Path]:
    """The resolved set and its file.

    Args:
        name_or_path: a shipped set's name ("v49"); the path of a set ending in ``.toml``; or the path of one ending in
            ``.json`` that holds a resolved set, as `rewards.dump_reward` makes it.

    Raises RewardError naming file, row and key.
    """
    if str(name_or_path).endswith(".json"):
        path = Path(name_or_path)
        resolved = _checked(ResolvedSet, path, _read(path, parse_json))
    else:
        path = _path(name_or_path, Path())
        resolved = _merge(_chain(path))
    _check(resolved, path)
    return resolved, path


def shipped_sets() -> tuple[str, ...]:
    """Names of the sets that come with the package, sorted."""
    return tuple(sorted(path.stem for path in SETS.glob("*.toml")))


def _path(name_or_path: str | Path, beside: Path) -> Path:
    if str(name_or_path).endswith(".toml"):
        return beside / name_or_path
    name = str(name_or_path)
    if name not in shipped_sets():
        raise RewardError(
            f'no reward set is called "{name}"{_did_you_mean(name, shipped_sets())}; shipped are '
            f"{', '.join(shipped_sets())}, and a file of your own is given by a path ending in .toml"
        )
    return SETS / f"{name}.toml"


def _chain(path: Path) -> list[tuple[Path, SetFile]]:
    """The files from the set itself up to its first ancestor."""
    chain: list[tuple[Path, SetFile]] = []
    seen: set[Path] = set()
    current: Path | None = path
    while current is not None:
        file = _checked(SetFile, current, _read(current, parse_toml))
        if current.resolve() in seen:
            raise RewardError(f'{current}: "extends" leads back to this file; remove one of the links')
        seen.add(current.resolve())
        chain.append((current, file))
        current = _path(file.extends, current.parent) if file.extends else None
    return chain


def _read(path: Path, parse: Callable[[str], object]) -> object:
    try:
        return parse(read_text(path))
    except Unreadable as error:
        raise RewardError(f"{path}: {error}") from None


def _checked(model: type[Checked], path: Path, table: object) -> Checked:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        faults = [_fault(path, table, fault["loc"], fault["type"], fault["msg"]) for fault in found[:FAULTS_SHOWN]]
        more = [f"{path}: and {len(found) - FAULTS_SHOWN:,} more faults"] * (len(found) > FAULTS_SHOWN)
        raise RewardError("\n".join([*faults, *more])) from None


def _fault(path: Path, table: object, loc: tuple[int | str, ...], kind: str, message: str) -> str:
    """One line: file, row, key, what was expected. Never the value: a case's text may be a patient's."""
    where, node = "", table
    for step in loc:
        if isinstance(node, list) and isinstance(step, int):
            node = node[step]
            label = node.get("name") if isinstance(node, dict) else None
            where += f"[{step + 1}]" + (f' "{clipped(label)[1:-1]}"' if isinstance(label, str) else "")
        elif step not in ("pattern", "number", "same") or (isinstance(node, dict) and step in node):
            node = node.get(step) if isinstance(node, dict) else None
            where += f"{'.' * bool(where)}{clipped(step)[1:-1] if isinstance(step, str) else step}"
    if kind == "extra_forbidden":
        return f"{path}: {where}: unknown key{_did_you_mean(str(loc[-1])[:80], KEYS)}"
    return f"{path}: {where or 'the file'}: {message.removeprefix('Value error, ')[:500]}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=1, cutoff=0.5)
    return f', did you mean "{close[0]}"?' if close else ""


def _merge(chain: list[tuple[Path, SetFile]]) -> ResolvedSet:
    """The files laid over each other, the first ancestor at the bottom."""
    base: dict[str, Outcome] = {}
    rules: dict[str, RuleRow] = {}
    single: dict[str, object] = {
        "pattern_timeout_s": None,
        "no_parse": None,
        "stacking": None,
        "answer": None,
        "bounds": None,
    }
    for path, file in reversed(chain):
        for name in file.drop:
            if name not in base and name not in rules:
                raise RewardError(f'{path}: drop: no row is called "{name}"{_did_you_mean(name, [*base, *rules])}')
            base.pop(name, None)
            rules.pop(name, None)
        _no_name_twice(path, file.rule)
        base |= file.base
        rules |= {row.name: row for row in file.rule}
        single |= {key: value for key in single if (value := getattr(file, key)) is not None}
    path, file = chain[0]
    missing = [key for key, value in single.items() if value is None and key != "bounds"]
    if missing:
        raise RewardError(f"{path}: expected the keys {', '.join(missing)}, here or in a set that this one extends")
    pieces = {"name": file.name, "about": file.about, "base": base, "rule": tuple(rules.values()), "case": file.case}
    return ResolvedSet.model_validate(pieces | single)


def _no_name_twice(path: Path, rows: Iterable[RuleRow]) -> None:
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise RewardError(f'{path}: rule: two rows are called "{repeated[0]}"; give each its own name')


def _check(resolved: ResolvedSet, path: Path) -> None:
    """What no single row can see: the base table covers each error once, names do not collide."""
    counts = Counter(error for row in resolved.base.values() for error in row.errors)
    for error in ERRORS:
        if counts[error] != 1:
            rows = ", ".join(name for name, row in resolved.base.items() if error in row.errors) or "none"
            raise RewardError(
                f"{path}: base: expected one row for the error predicted - gold = {error}, got {counts[error]} ({rows})"
            )
    _no_name_twice(path, resolved.rule)
    own = {row.name for row in resolved.rule if row.trigger and not isinstance(row.trigger, SameRow)}
    for row in resolved.rule:
        if isinstance(row.trigger, SameRow) and row.trigger.rule not in own:
            raise RewardError(
                f'{path}: rule "{row.name}".trigger.rule: no rule "{row.trigger.rule}" has a trigger of its own'
                f"{_did_you_mean(row.trigger.rule, own)}"
            )
    for row in resolved.rule:
        if row.name in RESERVED:
            raise RewardError(f'{path}: rule "{row.name}": this name is a component of every set; choose another')
