"""How much there is to read, as measured limits: each may only be lowered."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("grpo", "rewards") for path in sorted((ROOT / folder).rglob("*.py"))]
FLAT = {path.stem: path for path in sorted((ROOT / "grpo").glob("*.py")) if path.stem != "__init__"}
PASSIVE = {"config", "metrics", "token_budget", "stats"}
"""Flat modules that the core path reads from but does not pass through."""
MAX_LINES = 18_800
"""Lines of grpo and rewards; the aim is 17,000."""
MAX_CORE_LINES = 900
"""Lines of code reachable from `train()` within the flat modules; the aim is 700."""
MAX_FLAT_FILES = 18
MAX_FUNCTION_LINES = 50


@cache
def code_lines(path: Path) -> set[int]:
    """The numbers of the lines with code: no docstrings, comments or blank lines."""
    text = path.read_text(encoding="utf-8")
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    strings = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return lines - {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def lines_of(node: ast.stmt, lines: set[int]) -> int:
    return len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1)))


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The functions, classes and constants of a module."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))


def core_path() -> dict[str, int]:
    """Module → lines of code that `train()` can reach in it by name, through the flat modules."""
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FLAT.items()}
    defined = {name: dict(definitions(tree)) for name, tree in trees.items()}
    imported = {
        name: {
            alias.asname or alias.name: ((node.module or "").removeprefix("grpo."), alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for name, tree in trees.items()
    }
    reached: set[tuple[str, str]] = set()
    queue = [("train", "train")]
    while queue:
        module, name = queue.pop()
        if (module, name) in reached or module not in FLAT or module in PASSIVE:
            continue
        if name not in defined[module]:
            queue += [imported[module][name]] if name in imported[module] else []
            continue
        reached.add((module, name))
        queue += [(module, node.id) for node in ast.walk(defined[module][name]) if isinstance(node, ast.Name)]
    counts = dict.fromkeys(sorted({module for module, _ in reached}), 0)
    for module, name in reached:
        counts[module] += lines_of(defined[module][name], code_lines(FLAT[module]))
    return counts


def test_the_core_path_stays_short() -> None:
    counts = core_path()
    assert {"train", "rollout", "batch", "loss", "update"} <= counts.keys()
    assert sum(counts.values()) <= MAX_CORE_LINES, counts


def test_there_are_few_flat_files() -> None:
    assert len(FLAT) <= MAX_FLAT_FILES, sorted(FLAT)


def test_no_function_is_long() -> None:
    counts = {
        f"{path.relative_to(ROOT)}: {node.name}": lines_of(node, code_lines(path))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: count for name, count in counts.items() if count > MAX_FUNCTION_LINES}


def test_the_total_does_not_grow() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES) <= MAX_LINES


def test_every_folder_has_a_readme() -> None:
    folders = {path.parent for path in SOURCES if path.parent.parent == ROOT / "grpo"}
    assert not [folder for folder in folders if not (folder / "README.md").is_file()]
