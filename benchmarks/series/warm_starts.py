"""The lab's supervised starts: ``python -m benchmarks.series.warm_starts --out DIR``.

Two LoRA adapters on the embedded base, taught on vignettes of the train split only, and each wrong in a stated way:

    v43     a noisy start: misses three rules, wavers where nurses waver, misreads some complaints (`teach.v43`)
    mild    two levels too mild, always, so dangerous for every case of ESI 1 to 3 (`teach.too_mild`)

``starts.json`` says how they were taught and their sha256.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny_world.build import MIX, Lesson, Plan, pupils_of, save_embedded, teach
from benchmarks.tiny_world.patients import summary
from benchmarks.tiny_world.teacher import Teacher, too_mild, v43
from benchmarks.tiny_world.vignettes import draw_vignettes
from grpo.runtime.terminal import tolerate_narrow_encodings

SEED = 20260144


@dataclass(frozen=True, slots=True)
class Start:
    """One adapter: its lesson and its teacher."""

    lesson: Lesson
    teacher: Teacher
    vignettes: int = 4000


STARTS: dict[str, Start] = {
    "v43": Start(Lesson(steps=220, rows=16, learning_rate=2e-3, hits=0.10, noise=0.0, again=0.42), v43(0.10)),
    "mild": Start(Lesson(steps=140, rows=16, learning_rate=3e-3, hits=0.0, noise=0.0, again=0.42), too_mild),
}


def build_start(name: str, out: Path) -> float:
    """Teaches one start and writes it to ``out/NAME``; the mean loss of its last 50 steps."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo.config import resolve_path

    start, plan = STARTS[name], Plan()
    base = str(resolve_path("embedded:base"))
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    drawn = draw_vignettes("train", start.vignettes, mix=MIX, seed=SEED)
    pupils = pupils_of(tokenizer, [(v.stratum, v.text, summary(v.patient)) for v in drawn])
    model.requires_grad_(False)
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=plan.lora_r, lora_alpha=plan.lora_alpha, target_modules=list(plan.targets), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    loss = teach(adapted, tokenizer, pupils, start.lesson, start.teacher, seed=SEED, prompt_weight=0.0, bfloat16=False)
    shutil.rmtree(out / name, ignore_errors=True)
    save_embedded(adapted, out / name)
    return loss


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    tolerate_narrow_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.series.warm_starts", description="Teach the lab's starts."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for v43/, mild/ and starts.json")
    parser.add_argument("--only", choices=sorted(STARTS), help="one of them")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the weights depend on it in the last bits
    torch.set_flush_denormal(True)
    told = arguments.out / "starts.json"
    record: dict[str, Any] = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    for name in [arguments.only] if arguments.only else STARTS:
        loss = build_start(name, arguments.out)
        files = sorted((arguments.out / name).iterdir())
        record[name] = {
            "command": "python -m benchmarks.series.warm_starts --out DIR",
            "lesson": dataclasses.asdict(STARTS[name].lesson),
            "vignettes": STARTS[name].vignettes,
            "final_loss": loss,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "sha256": {f"{name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
        }
        told.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
