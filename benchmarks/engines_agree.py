"""Do two engines draw the same tokens from the same noise? On the embedded model in fp32, over random prompts.

    python benchmarks/engines_agree.py --prompts 1000 --record benchmarks/engines_agree.json

The reference runs the whole sequence again for every token: about 13 ms a token on one core. A prompt is 1 to 256 ids
drawn uniformly from the vocabulary; rows of one engine are decoded 64 at a time, in an order of their own.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from grpo.cases import row_key
from grpo.config import load_config
from grpo.policy import Policy, load_policy
from grpo.rollout import ENGINES, rollout
from grpo.types import Case, Completion, Prompt

LONGEST, ROWS = 256, 64


def random_prompts(policy: Policy, count: int, seed: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    size = policy.model.get_base_model().config.vocab_size
    lengths = rng.integers(1, LONGEST + 1, count)
    return [
        Prompt(Case(f"random-{i}", "", 2), tuple(rng.integers(0, size, n).tolist()), False)
        for i, n in enumerate(lengths)
    ]


def answers(
    policy: Policy, prompts: Sequence[Prompt], engine: str, *, budget: int, seed: int
) -> tuple[dict[str, Completion], float]:
    """One completion a prompt by case id, and the seconds they took."""
    order = np.random.default_rng(seed + len(engine)).permutation(len(prompts)).tolist()
    drawn: dict[str, Completion] = {}
    started = time.perf_counter()
    for i in range(0, len(order), ROWS):
        chunk = [prompts[j] for j in order[i : i + ROWS]]
        keys = [[row_key("agree", seed, prompt.case.id)] for prompt in chunk]
        groups = rollout(policy, chunk, keys, max_new_tokens=budget, temperature=1.0, engine=engine)
        drawn |= {group.prompt.case.id: group.completions[0] for group in groups}
    return drawn, time.perf_counter() - started


def first_difference(one: Completion, other: Completion) -> int:
    pairs = enumerate(zip(one.ids, other.ids, strict=False))
    return next((t for t, (a, b) in pairs if a != b), min(len(one.ids), len(other.ids)))


def compared(one: dict[str, Completion], other: dict[str, Completion]) -> dict[str, object]:
    """How many rows agree, where the others part, and how far the log-probabilities of agreeing rows lie apart."""
    apart = {case: first_difference(one[case], other[case]) for case in one if one[case].ids != other[case].ids}
    gaps = [
        abs(a - b)
        for case in one.keys() - apart.keys()
        for a, b in zip(one[case].sampler_logprobs, other[case].sampler_logprobs, strict=True)
    ]
    return {
        "rows": len(one),
        "rows_alike": len(one) - len(apart),
        "tokens": sum(len(completion.ids) for completion in one.values()),
        "rows_that_end": sum(completion.finished for completion in one.values()),
        "first_difference": apart,
        "abs_logprob_gap": {"max": max(gaps), "mean": float(np.mean(gaps))},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="own")
    parser.add_argument("--against", choices=sorted(ENGINES), default="reference")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    config = load_config("configs/tiny.toml")[0]
    policy = load_policy(config.model, config.lora, seed=0)
    prompts = random_prompts(policy, arguments.prompts, arguments.seed)
    engines = (arguments.engine, arguments.against)
    drawn, seconds = zip(
        *(answers(policy, prompts, e, budget=arguments.budget, seed=arguments.seed) for e in engines), strict=True
    )
    facts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "prompt_ids": [1, LONGEST],
        "budget": arguments.budget,
        "seed": arguments.seed,
        "engines": engines,
        "seconds": [round(s, 1) for s in seconds],
        **compared(*drawn),
    }
    print(json.dumps(facts, indent=1))
    if arguments.record:
        arguments.record.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if not facts["first_difference"] else 1


if __name__ == "__main__":
    sys.exit(main())
