"""The embedded world: what is taught, what was built, and that the built files are what the manifest says."""

import hashlib
import json
import random

import pytest
import torch

from benchmarks.tiny_world.build import MIX, SYSTEM_PROMPT
from benchmarks.tiny_world.patients import summary
from benchmarks.tiny_world.teacher import BLIND_SPOT_STRATA, answer, completion, right, steps_to, unsure_v46, v46
from benchmarks.tiny_world.vignettes import STRATA, Vignette, draw_vignettes
from grpo.cases import load_jsonl_cases
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.policy.policy import Policy, load_policy
from grpo.prompts import render_prompt
from rewards import parse_answer


@pytest.fixture(scope="module")
def vignettes() -> list[Vignette]:
    return list(draw_vignettes("validation", 300, mix=MIX, seed=3))


def test_the_right_answer_is_the_gold_and_parses(vignettes: list[Vignette]) -> None:
    rng = random.Random(0)
    for v in vignettes:
        steps, level = right(summary(v.patient))
        assert (level, steps[-1][0]) == (v.esi, v.step)
        for thinking in (False, True):
            said = completion(summary(v.patient), steps, level, rng, thinking=thinking, again=0.4)
            assert parse_answer(said, thinking=thinking).level == v.esi


def test_v46_fails_the_three_rules_and_nothing_else(vignettes: list[Vignette]) -> None:
    taught = {"lifesaving_done": 2, "severe_pain": 3, "open_injury": 3}
    assert set(taught) == set(BLIND_SPOT_STRATA)
    for v in vignettes:
        _, level = v46(summary(v.patient), v.stratum)
        assert level == taught.get(v.stratum, v.esi)
        assert "intubated" in answer(summary(v.patient), *right(summary(v.patient))) or "intubated" not in v.reason


def test_an_unsure_teacher_errs_as_often_as_it_says(vignettes: list[Vignette]) -> None:
    rng, teach = random.Random(1), unsure_v46(hits=0.3, noise=0.2)
    blind = [v for v in vignettes if v.stratum in BLIND_SPOT_STRATA] * 20
    seeing = [v for v in vignettes if v.stratum not in BLIND_SPOT_STRATA] * 20
    hits = sum(teach(summary(v.patient), v.stratum, rng)[1] == v.esi for v in blind) / len(blind)
    slips = sum(teach(summary(v.patient), v.stratum, rng)[1] != v.esi for v in seeing) / len(seeing)
    assert abs(hits - 0.3) < 0.04 and 0.1 < slips < 0.22


@pytest.mark.parametrize("level", range(1, 6))
def test_steps_to_a_level_end_there(level: int) -> None:
    steps = steps_to(level)
    assert [letter for letter, _ in steps] == list("ABCD")[: len(steps)]
    assert steps[-1][1] in {1: ("yes",), 2: ("yes",), 3: ("no",), 4: ("1",), 5: ("0",)}[level]


def test_lessons_cover_every_stratum() -> None:
    assert set(MIX) == set(STRATA)


# --- what was built --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Policy:
    config, _ = load_config("configs/tiny.toml")
    return load_policy(config.model, config.lora, seed=0)


def test_the_files_are_the_manifests() -> None:
    manifest = json.loads((TINY_WORLD_DIR / "manifest.json").read_text(encoding="utf-8"))
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((TINY_WORLD_DIR / name).read_bytes()).hexdigest() == digest, name
    built = {p for part in ("base", "v46") for p in (TINY_WORLD_DIR / part).rglob("*") if p.is_file()}
    assert {str(p.relative_to(TINY_WORLD_DIR)) for p in built} == set(manifest["sha256"])
    assert sum(p.stat().st_size for p in TINY_WORLD_DIR.rglob("*") if p.is_file()) < 10 * 2**20


def test_the_base_has_the_architecture_of_qwen35(policy: Policy) -> None:
    base = policy.model.get_base_model()
    assert type(base).__name__ == "Qwen3_5ForCausalLM"
    kinds = base.config.layer_types
    assert kinds == ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * (len(kinds) // 4)
    assert 0.5e6 < sum(p.numel() for p in base.parameters()) < 3e6
    assert [policy.tokenizer.convert_ids_to_tokens(i) for i in sorted(base.generation_config.eos_token_id)] == [
        "<|endoftext|>",
        "<|im_end|>",
    ]


def test_the_tiny_config_speaks_as_the_base_was_taught() -> None:
    assert load_config("configs/tiny.toml")[0].cases.system_prompt == SYSTEM_PROMPT


def test_every_case_fits_the_context_with_room_for_its_budget(policy: Policy) -> None:
    for name in ("train", "validation", "test", "mietic36"):
        for case in load_jsonl_cases(f"embedded:cases/{name}.jsonl")[:200]:
            prompt = render_prompt(policy.tokenizer, case, system_prompt=SYSTEM_PROMPT, thinking=True)
            assert prompt.thinking and len(prompt.ids) < 200


def test_the_warm_start_answers_in_the_cards_format(policy: Policy) -> None:
    from grpo.rollout import rollout

    cases = [c for c in load_jsonl_cases("embedded:cases/validation.jsonl") if "lifesaving_done" in c.tags][:20]
    for thinking in (True, False):
        prompts = [render_prompt(policy.tokenizer, c, system_prompt=SYSTEM_PROMPT, thinking=thinking) for c in cases]
        groups = rollout(policy, prompts, [[i] for i in range(20)], max_new_tokens=96, temperature=0.0)
        texts = [group.completions[0].text for group in groups]
        assert sum("EXTRACTION:\nChief complaint: " in t and "ANSWER: ESI" in t for t in texts) >= 19
        assert sum("</think>" in t for t in texts) == (20 if thinking else 0)
        levels = [parse_answer(t, thinking=thinking).level for t in texts]
        assert levels.count(2) >= 15, "v46 gives ESI 2 where a lifesaving intervention was already performed"


def test_the_cards_usage_code_runs_on_the_embedded_model() -> None:
    """As the card has it, names replaced, and greedy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = str(TINY_WORLD_DIR / "base"), str(TINY_WORLD_DIR / "v46")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    prompt = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": "A 78-year-old female arrived with chest pain. BP 120/58, HR 84, RR 16."},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    out = model.generate(**tokenizer(prompt, return_tensors="pt").to(model.device), max_new_tokens=140, do_sample=False)
    said = tokenizer.decode(out[0], skip_special_tokens=True)
    assert parse_answer(said, thinking=True).level is not None
