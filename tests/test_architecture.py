"""The house rules that a machine can hold: who imports whom, what stays small, what is never called."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [
    "grpo.types", "grpo.config", "grpo.advantage", "grpo.loss", "grpo.logprobs", "grpo.stats", "grpo.cases",
    "grpo.plan", "grpo.examine", "grpo.preflight",
    "grpo.policy", "grpo.rollout", "grpo.batch", "grpo.budget", "grpo.update", "grpo.checkpoint", "grpo.evaluate",
    "grpo.run", "grpo.train",
]  # fmt: skip
"""From the ground up: a room imports only rooms above it in this list."""
TORCH_FREE = (
    "grpo/config.py", "grpo/advantage.py", "grpo/stats.py", "grpo/budget.py", "grpo/tiny/teach.py", "grpo/cases.py",
    "grpo/plan.py", "grpo/examine.py", "grpo/preflight.py",
)  # fmt: skip
SOURCES = sorted(p for folder in ("grpo", "rewards") for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p) in ROOMS], ids=name_of)
def test_imports_point_only_down(path: Path) -> None:
    allowed = ROOMS[: ROOMS.index(name_of(path))]
    ours = [name for name in imports(path) if name.startswith("grpo")]
    assert set(ours) <= set(allowed), f"{name_of(path)} imports {sorted(set(ours) - set(allowed))}"


def test_every_room_is_in_the_list() -> None:
    found = {name_of(p) for p in SOURCES if p.parent == ROOT / "grpo" and p.stem != "__init__"}
    assert found == set(ROOMS)


def test_rewards_know_neither_torch_nor_the_trainer() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "rewards"):
            assert not [n for n in imports(path) if n.split(".")[0] in ("torch", "grpo", "transformers", "peft")], path


def test_what_needs_no_torch_imports_none() -> None:
    for name in TORCH_FREE:
        heavy = [n for n in imports(ROOT / name) if n.split(".")[0] in ("torch", "transformers", "peft")]
        assert not heavy, name


def test_nothing_is_evaluated_unpickled_or_fetched_as_code() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec", "compile", "__import__"}, path
        assert not set(imports(path)) & {"pickle", "marshal", "shelve", "dill"}, path
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8")
        attributes = {
            ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        }
        assert "torch.load" not in attributes, path


def test_functions_stay_readable() -> None:
    long = {
        f"{name_of(path)}.{node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno + 1 > 75
    }
    assert not long
