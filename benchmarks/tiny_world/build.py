"""Builds the embedded base and its warm start: ``python -m benchmarks.tiny_world.build --out DIR``.

The base has the architecture of Qwen3.5 (three Gated DeltaNet layers to one of gated attention), a byte-level BPE of
its own and the chat template's two thinking modes. It is taught the answer format and an uncertain idea of the levels.
On it a LoRA adapter "v46" is taught to be mostly right, except for the three rules the card says v46 missed.
Both are supervised on vignettes of the train split only. The manifest says how, and how they score on validation.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from benchmarks.tiny_world.model import make_model, make_tokenizer
from benchmarks.tiny_world.patients import Summary, summary
from benchmarks.tiny_world.teacher import Teacher, answer, completion, right, thought, unsure_v46
from benchmarks.tiny_world.vignettes import STRATA, draw_vignettes
from grpo.logprobs import join
from grpo.runtime.terminal import tolerate_narrow_encodings

SYSTEM_PROMPT = "Extract clinical fields, apply the ESI algorithm, then state the ESI level."
"""A short form of the card's system prompt: the tiny model has few tokens to spend."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """How one stage is taught."""

    steps: int
    rows: int
    learning_rate: float
    hits: float
    """Share of the blind-spot cases it is taught the right answer of."""
    noise: float
    """Share of the other cases it is taught a level beside the right one."""
    again: float
    """Chance of another look in a thought."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole build: change a number, and the manifest shows it."""

    seed: int = 20260101
    vignettes: int = 40_000
    vocabulary: int = 1024
    base: Lesson = Lesson(steps=3200, rows=32, learning_rate=3e-3, hits=0.2, noise=0.2, again=0.42)
    warm_start: Lesson = Lesson(steps=600, rows=32, learning_rate=1e-3, hits=0.12, noise=0.0, again=0.42)
    lora_r: int = 16
    lora_alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    prompt_weight: float = 0.1
    """Weight of a prompt token in the base's loss; a completion token has 1."""


POOL = 16
"""Steps whose rows are drawn together and sorted by length."""

WIDTH_GRID = 32
"""Widths are padded to a multiple of this: a CPU compiles its bfloat16 products anew for every shape it meets."""

MIX = {
    "lifesaving_done": 14,
    "lifesaving_other": 9,
    "severe_pain": 13,
    "open_injury": 10,
    "high_risk": 14,
    "danger_vitals": 8,
    "resources_many": 14,
    "resource_one": 10,
    "resource_none": 8,
}
"""Parts of each stratum in the lessons."""


@dataclass(frozen=True, slots=True)
class Pupil:
    """A vignette as the lessons use it."""

    stratum: str
    summary: Summary
    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    """Without and with thinking."""


def teach(
    model: nn.Module,
    tokenizer: Any,
    pupils: Sequence[Pupil],
    lesson: Lesson,
    teacher: Teacher,
    *,
    seed: int,
    prompt_weight: float,
    bfloat16: bool = True,
) -> float:
    """Supervised steps on whatever of ``model`` is trainable; the mean loss of the last 50 steps.

    Args:
        bfloat16: products in bfloat16, which is a third faster where the CPU has them; the weights stay float32.
    """
    rng = random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lesson.learning_rate, weight_decay=0.01)
    warmup = max(1, lesson.steps // 20)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lesson.learning_rate, total_steps=lesson.steps + 1, pct_start=warmup / lesson.steps
    )
    model.train()
    losses: list[float] = []
    bar = tqdm(lessons(tokenizer, pupils, lesson, teacher, rng), total=lesson.steps, unit="step", mininterval=5)
    for prompts, completions in bar:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = lesson_loss(model, prompts, completions, prompt_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def lessons(
    tokenizer: Any, pupils: Sequence[Pupil], lesson: Lesson, teacher: Teacher, rng: random.Random
) -> Iterator[tuple[list[tuple[int, ...]], list[list[int]]]]:
    """Prompts and completions of each step: half of the rows think. Rows of like length are taught together, which
    saves a third of the padding."""
    left = lesson.steps
    while left > 0:
        pool = [
            sample_row(tokenizer, pupils, lesson, teacher, rng, thinking=i % 2 == 1) for i in range(POOL * lesson.rows)
        ]
        pool.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [pool[i : i + lesson.rows] for i in range(0, len(pool), lesson.rows)]
        rng.shuffle(batches)
        for batch in batches[:left]:
            yield [prompt for prompt, _ in batch], [said for _, said in batch]
        left -= POOL


def sample_row(
    tokenizer: Any, pupils: Sequence[Pupil], lesson: Lesson, teacher: Teacher, rng: random.Random, *, thinking: bool
) -> tuple[tuple[int, ...], list[int]]:
    """One prompt and what the teacher says to it, end token included."""
    pupil = rng.choice(pupils)
    steps, level = teacher(pupil.summary, pupil.stratum, rng)
    said = completion(pupil.summary, steps, level, rng, thinking=thinking, again=lesson.again)
    return pupil.prompts[thinking], [*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]


def lesson_loss(
    model: nn.Module, prompts: list[tuple[int, ...]], completions: list[list[int]], prompt_weight: float
) -> Tensor:
    """Cross-entropy a token, prompt tokens weighted down."""
    joined = join(prompts, completions, pad_id=0)
    padding = (0, -joined.input_ids.shape[1] % WIDTH_GRID)
    input_ids, real = pad(joined.input_ids, padding), pad(joined.attention_mask, padding)
    targets = input_ids[:, 1:]
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None] - 1
    weights = torch.where(torch.arange(targets.shape[1]) >= starts, 1.0, prompt_weight)
    weights = torch.where(real[:, 1:], weights, 0.0)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def corpus(plan: Plan) -> tuple[list[tuple[str, str, Summary]], list[str]]:
    """(stratum, text, summary) of each vignette of the lessons, and the texts that the BPE is trained on."""
    drawn = draw_vignettes("train", plan.vignettes, mix=MIX, seed=plan.seed)
    rows = [(v.stratum, v.text, summary(v.patient)) for v in drawn]
    rng = random.Random(plan.seed)
    texts = [text for _, text, _ in rows[:8000]]
    for _, _, facts in rows[:4000]:
        texts += [
            SYSTEM_PROMPT,
            answer(facts, *right(facts)),
            thought(facts, rng, again=0.4),
            "system user assistant",
        ]
    return rows, texts


def pupils_of(tokenizer: Any, rows: Sequence[tuple[str, str, Summary]]) -> list[Pupil]:
    """(stratum, text, summary) as the lessons use them, prompts rendered in both modes."""
    from grpo.prompts import render_prompt
    from grpo.types import Case

    pupils = []
    for stratum, text, facts in tqdm(rows, desc="prompts", mininterval=5):
        off, on = (
            render_prompt(tokenizer, Case("x", text, 1), system_prompt=SYSTEM_PROMPT, thinking=thinking).ids
            for thinking in (False, True)
        )
        pupils.append(Pupil(stratum, facts, (off, on)))
    return pupils


def build(out: Path, plan: Plan) -> None:
    """Writes ``base/``, ``v46/`` and ``manifest.json`` under ``out``."""
    from peft import LoraConfig, get_peft_model

    assert set(MIX) == set(STRATA)
    started = time.time()
    rows, texts = corpus(plan)
    tokenizer = make_tokenizer(texts, plan.vocabulary)
    pupils = pupils_of(tokenizer, rows)
    model = make_model(tokenizer, plan.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} ids")
    lesson = plan.base
    teacher = unsure_v46(lesson.hits, lesson.noise)
    base_loss = teach(model, tokenizer, pupils, lesson, teacher, seed=plan.seed, prompt_weight=plan.prompt_weight)
    shutil.rmtree(out / "base", ignore_errors=True)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    model.requires_grad_(False)
    torch.manual_seed(plan.seed + 1)
    lora = LoraConfig(
        r=plan.lora_r, lora_alpha=plan.lora_alpha, target_modules=list(plan.targets), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    lesson = plan.warm_start
    teacher = unsure_v46(lesson.hits, lesson.noise)
    warm_loss = teach(adapted, tokenizer, pupils, lesson, teacher, seed=plan.seed + 1, prompt_weight=0.0)
    shutil.rmtree(out / "v46", ignore_errors=True)
    save_embedded(adapted, out / "v46")
    facts = {"final_loss": {"base": base_loss, "v46": warm_loss}, "minutes": round((time.time() - started) / 60, 1)}
    write_manifest(out, plan, facts)


def save_embedded(adapted: Any, folder: Path) -> None:
    """The adapter in PEFT's layout, its base named as configs name it."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    saved = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": "embedded:base"}
    saved["target_modules"] = sorted(saved["target_modules"])
    config.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def held_out_scores(out: Path, plan: Plan) -> dict[str, dict[str, float]]:
    """Exact share of greedy answers on the validation vignettes, by model and mode, and by stratum for v46."""
    from grpo.cases import load_jsonl_cases
    from grpo.config import LoraSection, ModelSection
    from grpo.policy.policy import as_reference, load_policy
    from grpo.prompts import render_prompt
    from grpo.rollout import rollout
    from rewards import parse_answer

    lora = LoraSection(
        r=plan.lora_r, alpha=plan.lora_alpha, dropout=0.0, target_modules=plan.targets, warm_start=str(out / "v46")
    )
    model = ModelSection(name=str(out / "base"), device="cpu", dtype="float32", gradient_checkpointing=False)
    policy = load_policy(model, lora, seed=0)
    cases = load_jsonl_cases("embedded:cases/validation.jsonl")
    scores: dict[str, dict[str, float]] = {}
    for name, reference in (("base", True), ("v46", False)):
        for thinking in (True, False):
            prompts = [
                render_prompt(policy.tokenizer, case, system_prompt=SYSTEM_PROMPT, thinking=thinking) for case in cases
            ]
            with as_reference(policy, None) if reference else contextlib.nullcontext():
                groups = rollout(policy, prompts, [[0]] * len(prompts), max_new_tokens=160, temperature=0.0)
            hits = {
                group.prompt.case: parse_answer(group.completions[0].text, thinking=thinking).level
                == group.prompt.case.gold_level
                for group in groups
            }
            shares = {"all": sum(hits.values()) / len(hits)}
            for stratum in STRATA:
                members = [hit for case, hit in hits.items() if stratum in case.tags]
                shares[stratum] = sum(members) / len(members)
            scores[f"{name}, thinking {'on' if thinking else 'off'}"] = {k: round(v, 3) for k, v in shares.items()}
    return scores


def write_manifest(out: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """What was built, from what, how it scores, and its sha256."""
    import transformers

    files = sorted(p for part in ("base", "v46") for p in (out / part).rglob("*") if p.is_file())
    manifest = {
        "command": "python -m benchmarks.tiny_world.build --out DIR",
        "plan": dataclasses.asdict(plan),
        "mix": MIX,
        **facts,
        "held_out_exact": held_out_scores(out, plan),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "sha256": {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    tolerate_narrow_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_world.build", description="Build the embedded model."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, v46/ and manifest.json")
    parser.add_argument("--threads", type=int, default=2, help="the weights depend on it in the last bits")
    parser.add_argument("--score-only", action="store_true", help="score what is in --out and rewrite the manifest")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.score_only:
        manifest = json.loads((arguments.out / "manifest.json").read_text(encoding="utf-8"))
        write_manifest(arguments.out, Plan(), {key: manifest[key] for key in ("final_loss", "minutes")})
    else:
        build(arguments.out, Plan())
    return 0


if __name__ == "__main__":
    sys.exit(main())
