"""The house rules that a machine can hold: who imports whom, what stays small, what is never called."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [
    "grpo.recorded.terminal", "grpo.types", "grpo.tensorfile", "grpo.config", "grpo.durable", "grpo.stop",
    "grpo.free_memory", "grpo.optional_kernels", "grpo.ranks", "grpo.out_of_memory", "grpo.advantage", "grpo.loss",
    "grpo.logprobs", "grpo.stats",
    "grpo.evaluation.agreement", "grpo.evaluation.rates", "grpo.evaluation.failures", "grpo.loaders.report",
    "grpo.loaders.fields", "grpo.loaders.lines", "grpo.loaders.narrative", "grpo.loaders.jsonl",
    "grpo.loaders.mietic", "grpo.loaders.mimic", "grpo.cases", "grpo.evaluation.fingerprint",
    "grpo.evaluation.comparison", "grpo.plan", "grpo.examine", "grpo.preflight", "grpo.prepare", "grpo.adapter",
    "grpo.random_base", "grpo.base_model", "grpo.prompts", "grpo.policy",
    "grpo.engine.sampling", "grpo.engine.reference", "grpo.engine.generic", "grpo.engine.in_step",
    "grpo.engine.gated_delta", "grpo.engine.weights", "grpo.engine.state", "grpo.engine.plain", "grpo.engine.fused",
    "grpo.engine.decode",
    "grpo.rollout", "grpo.roofline", "grpo.batch",
    "grpo.forward.layers", "grpo.forward.gated_delta", "grpo.forward.shared_prefix", "grpo.forward.modules",
    "grpo.forward.passes", "grpo.forward.memory", "grpo.self_check",
    "grpo.score", "grpo.budget", "grpo.account", "grpo.ledger", "grpo.update", "grpo.checkpoint",
    "grpo.evaluation.answers", "grpo.evaluation.request", "grpo.run", "grpo.recorded.difference",
    "grpo.recorded.recording", "grpo.recorded.counterfactual", "grpo.recorded.recompute",
    "grpo.replay", "grpo.recorded.panels", "grpo.inspect", "grpo.evaluation.scorecard", "grpo.evaluate",
    "grpo.model_card", "grpo.weights", "grpo.merge", "grpo.triage", "grpo.setup", "grpo.groups",
    "grpo.opening", "grpo.endings", "grpo.train", "grpo.bench", "grpo.report.numerals",
    "grpo.report.charts", "grpo.report.gather", "grpo.report.figures", "grpo.report.views", "grpo.report.evaluation",
    "grpo.report.budgets", "grpo.report.tokens", "grpo.report.samples", "grpo.report.recipe", "grpo.report.page",
    "grpo.report.__main__", "grpo.mirror", "grpo.lab.plan", "grpo.lab.threshold", "grpo.lab.runner", "grpo.lab.seen",
    "grpo.lab.claims", "grpo.lab.record", "grpo.lab.page", "grpo.lab.__main__",
]  # fmt: skip
"""From the ground up: a room imports only rooms above it in this list."""
TORCH_FREE = (
    "grpo/config.py", "grpo/durable.py", "grpo/stop.py", "grpo/advantage.py", "grpo/stats.py", "grpo/budget.py",
    "grpo/tiny/teach.py", "grpo/cases.py", "grpo/plan.py", "grpo/examine.py", "grpo/preflight.py", "grpo/prepare.py",
    "grpo/loaders/report.py", "grpo/loaders/fields.py", "grpo/loaders/lines.py", "grpo/loaders/narrative.py",
    "grpo/loaders/jsonl.py", "grpo/loaders/mietic.py", "grpo/loaders/mimic.py", "grpo/recorded/difference.py",
    "grpo/recorded/terminal.py", "grpo/recorded/panels.py", "grpo/evaluation/agreement.py", "grpo/evaluation/rates.py",
    "grpo/evaluation/failures.py", "grpo/evaluation/fingerprint.py", "grpo/evaluation/comparison.py",
    "grpo/evaluation/scorecard.py", "grpo/mirror.py", "grpo/report/gather.py", "grpo/report/charts.py",
    "grpo/report/figures.py", "grpo/report/views.py", "grpo/lab/plan.py", "grpo/lab/threshold.py",
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
    found = {
        name_of(p)
        for p in SOURCES
        if p.is_relative_to(ROOT / "grpo") and p.parent.name != "tiny" and p.stem != "__init__"
    }
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
