"""Shared fixtures: a random Qwen3.5 in miniature, saved and loaded through the same path as the 9B model."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_world.model import make_model, make_tokenizer
from grpo.config import LoraSection, ModelSection
from grpo.policy.policy import Policy, load_policy
from grpo.runtime.distributed import SINGLE_PROCESS, World

TEXTS = (
    "Extract clinical fields, apply the ESI algorithm, then state the ESI level.",
    "A 54-year-old male arrived intubated for airway protection. Central line placed. BP 120/58, HR 150, pain 9/10.",
    "EXTRACTION:\nChief complaint: chest pain\nVital signs: stable\nRed flags: none\nANSWER: ESI 2",
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

if "OMP_NUM_THREADS" not in os.environ:  # more threads than cores wait for each other in a spin
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # `nohup` and a shell's background hand that on to what tests start
        signal.signal(number, usual)

os.umask(MASK := os.umask(0o077))


CORE = (
    "test_advantage test_cases test_config test_logprobs test_loss test_metrics test_token_budget test_update",
    "rewards/test_parse rewards/test_proof run/test_checkpoint",
)
"""Files of the tests that ``pytest -m core`` runs: the maths, the reward, one whole step, and what a resume reads."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    core = {Path(__file__).parent / f"{name}.py" for names in CORE for name in names.split()}
    for item in items:
        if item.path in core:
            item.add_marker("core")


@pytest.fixture(autouse=True)
def file_mode_mask() -> Iterator[None]:
    """Give every test the mask the session began with: commands and fixtures in this process change it."""
    os.umask(MASK)
    yield
    os.umask(MASK)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("random_base")
    tokenizer = make_tokenizer(TEXTS, 400)
    make_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_policy(random_base: Path) -> Callable[..., Policy]:
    return partial(policy_on, random_base)


def policy_on(
    base: Path,
    *,
    dropout: float = 0.0,
    checkpointing: bool = False,
    moved: bool = True,
    ranks: World = SINGLE_PROCESS,
    **lora: object,
) -> Policy:
    """A policy on the random base whose fresh adapter is no longer zero."""
    policy = load_policy(
        ModelSection(name=str(base), device="cpu", dtype="float32", gradient_checkpointing=checkpointing),
        LoraSection(**{"r": 4, "alpha": 8.0, "dropout": dropout, "target_modules": TARGETS, "warm_start": ""} | lora),
        seed=1,
        ranks=ranks,
    )
    if moved:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in policy.adapter_parameters().values():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy
