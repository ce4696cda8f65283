"""Do the engines draw the same tokens from the same noise? On the embedded model in fp32, over random prompts.

    python benchmarks/engines_agree.py --prompts 1000 --record benchmarks/engines_agree.json

The reference runs the whole sequence again for every token: about 13 ms a token on one core. A prompt is 1 to 256 ids
drawn uniformly from the vocabulary; rows are decoded 64 at a time, for each engine in an order of its own.

Two evaluations of one distribution in fp32 differ in the last digits, and noise that falls between two such boundaries
draws two ids. Wherever a row parts from the reference the record says how near the noise was to a boundary, and how far
the reference itself is from a forward pass with fp64 products. Nearer than that no fp32 engine can decide: a tie.
Anything else is a fault, and the exit code is then 1.
"""

import argparse
import copy
import datetime
import json
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo.cases import stable_seed
from grpo.config import load_config
from grpo.engine.sampling import uniforms
from grpo.policy.policy import Policy, load_policy
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
        keys = [[stable_seed("agree", seed, prompt.case.id)] for prompt in chunk]
        groups = rollout(policy, chunk, keys, max_new_tokens=budget, temperature=1.0, engine=engine)
        drawn |= {group.prompt.case.id: group.completions[0] for group in groups}
    return drawn, time.perf_counter() - started


def first_difference(one: Completion, other: Completion) -> int:
    pairs = enumerate(zip(one.ids, other.ids, strict=False))
    return next((t for t, (a, b) in pairs if a != b), min(len(one.ids), len(other.ids)))


@torch.inference_mode()
def tie(policy: Policy, precise: Any, prompt: Prompt, said: Sequence[int], noise: float) -> dict[str, float]:
    """After the ids ``said``: how far the noise is from a boundary, and the reference's own rounding there."""
    ids = torch.tensor([[*prompt.ids, *said]])
    exact, rounded = (
        m(input_ids=ids).logits[0, -1].log_softmax(-1).double().exp().cumsum(0) for m in (precise, policy.model)
    )
    return {
        "token": len(said),
        "noise_to_boundary": float((exact - noise).abs().min()),
        "reference_rounding": float((rounded - exact).abs().max()),
    }


def compared(
    policy: Policy, prompts: Sequence[Prompt], one: dict[str, Completion], reference: dict[str, Completion], seed: int
) -> dict[str, Any]:
    """How many rows agree with the reference, where the others part, and how far the log-probabilities lie apart."""
    precise = copy.deepcopy(policy.model).double()
    parted = {}
    for prompt in prompts:
        case = prompt.case.id
        if one[case].ids != reference[case].ids:
            t = first_difference(one[case], reference[case])
            noise = uniforms([stable_seed("agree", seed, case)], t + 1)[0, t]
            parted[case] = tie(policy, precise, prompt, reference[case].ids[:t], noise)
    gaps = [
        abs(a - b)
        for case in one.keys() - parted.keys()
        for a, b in zip(one[case].sampler_logprobs, reference[case].sampler_logprobs, strict=True)
    ]
    return {
        "rows_alike": len(one) - len(parted),
        "ties": sum(found["noise_to_boundary"] <= found["reference_rounding"] for found in parted.values()),
        "parted": parted,
        "abs_logprob_gap": {"max": max(gaps), "mean": float(np.mean(gaps))},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--engines", choices=sorted(set(ENGINES) - {"reference"}), nargs="+", default=["own", "generic"]
    )
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    config = load_config("configs/tiny.toml")[0]
    policy = load_policy(config.model, config.lora, seed=0)
    prompts = random_prompts(policy, arguments.prompts, arguments.seed)
    draw = partial(answers, policy, prompts, budget=arguments.budget, seed=arguments.seed)
    reference, seconds = draw("reference")
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "prompt_ids": [1, LONGEST],
        "budget": arguments.budget,
        "seed": arguments.seed,
        "rows": len(reference),
        "tokens": sum(len(completion.ids) for completion in reference.values()),
        "rows_that_end": sum(completion.finished for completion in reference.values()),
        "reference": {"seconds": round(seconds, 1)},
    }
    for engine in arguments.engines:
        drawn, seconds = draw(engine)
        facts[engine] = {"seconds": round(seconds, 1)}
        facts[engine] |= compared(policy, prompts, drawn, reference, arguments.seed)
    print(json.dumps(facts, indent=1))
    if arguments.record:
        arguments.record.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(facts[e]["rows_alike"] + facts[e]["ties"] == len(reference) for e in arguments.engines) else 1


if __name__ == "__main__":
    sys.exit(main())
