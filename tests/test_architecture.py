"""The house rules that a machine can hold: who imports whom, what stays small, what is never called."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = (
    "rewards",
    "runtime",
    "config types stats advantage loss logprobs",
    "data cases",
    "scoring batch token_budget metrics",
    "prompts policy",
    "engine qwen3_5",
    "rollout forward update",
    "preflight",
    "run",
    "evaluation dynamic_sampling",
    "inspection report",
    "train commands __main__",
    "tiny",
    "benchmarks",
)
"""A module imports from its own folder and from what stands before it here: the flat modules and folders of grpo."""
ORDER = [unit for layer in LAYERS for unit in layer.split()]
TORCH_FREE = (
    "config advantage stats token_budget cases data/* preflight/* policy/memory_plan run/input_hashes __main__",
    "runtime/atomic_files runtime/interrupts runtime/terminal inspection/bit_diff inspection/step_text",
    "inspection/run_reader evaluation/statistics evaluation/metrics evaluation/failures evaluation/comparison",
    "evaluation/table report/charts report/figures commands/preflight commands/prepare",
)
SOURCES = sorted(p for folder in ("grpo", "rewards", "benchmarks/series") for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[str]:
    """Names of modules; of ``from PACKAGE import MODULE``, the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inner & MODULES.keys() or {node.module or ""}


def layer_of(module: str) -> int:
    """The position of a module's folder, or of a flat module itself."""
    top, *rest = module.split(".")
    return ORDER.index(rest[0] if top == "grpo" else top)


def test_imports_point_only_down() -> None:
    ours = {(name, target) for name, path in MODULES.items() for target in imports(path) if target in MODULES}
    against = {
        (name, target)
        for name, target in ours
        if name != "grpo" and target != "grpo" and layer_of(target) > layer_of(name)
    }
    assert not against


def test_no_module_imports_itself_on_a_detour() -> None:
    TopologicalSorter({name: set(imports(path)) & MODULES.keys() for name, path in MODULES.items()}).prepare()


def test_rewards_know_neither_torch_nor_the_trainer() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "rewards"):
            assert not [n for n in imports(path) if n.split(".")[0] in ("torch", "grpo", "transformers", "peft")], path


def test_what_needs_no_torch_imports_none() -> None:
    for pattern in " ".join(TORCH_FREE).split():
        paths = list((ROOT / "grpo").glob(f"{pattern}.py"))
        assert paths, pattern
        for path in paths:
            assert not [n for n in imports(path) if n.split(".")[0] in ("torch", "transformers", "peft")], path


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


def test_there_are_few_kinds_of_errors() -> None:
    """`UserError` for errors a user can fix; another class only if some code must distinguish it."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for path in SOURCES
        if not path.is_relative_to(ROOT / "benchmarks")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    errors = {name for name, names in bases.items() if any(re.search("(Error|Exception)$", base) for base in names)}
    while derived := {name for name, names in bases.items() if names & errors} - errors:
        errors |= derived
    assert len(errors) <= 10, sorted(errors)
