"""The roofline against arithmetic done by hand, and against the modules and caches that it counts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from benchmarks.roofline import (
    Attention,
    Costs,
    Rates,
    Work,
    costs_of,
    decode_floor,
    floor_of,
    forward_flops,
    measure_rates,
    step_floor,
    train_flops,
    weights_read,
)
from grpo.config import load_config
from grpo.policy.memory_plan import RANDOM_SHAPES, base_parameter_count
from grpo.policy.policy import Policy
from grpo.policy.random_model import build_random_model

META = torch.device("meta")
V49 = Work((200,), (0,) * 8, (1024,) * 8, (True,) * 8)
H200, GB10 = Rates(4.3e12, 790e12), Rates(273e9, 100e12)


@pytest.fixture(scope="module")
def nine() -> Costs:
    """Qwen3.5-9B with the adapter of configs/v49.toml, its weights nowhere."""
    from peft import LoraConfig, get_peft_model

    base, _ = build_random_model("random:qwen3.5-9b", device=META, dtype=torch.bfloat16)
    lora = load_config("configs/v49.toml")[0].lora
    adapted = LoraConfig(r=lora.r, target_modules=list(lora.target_modules), task_type="CAUSAL_LM")
    return costs_of(get_peft_model(base, adapted).get_base_model())


def test_what_a_token_costs_the_9b_model(nine: Costs) -> None:
    attends = 4096 * (2 * 16 * 256) + 2 * 4096 * (4 * 256) + (16 * 256) * 4096
    recurs = 4096 * (2 * 16 * 128 + 32 * 128) + 4096 * 32 * 128 + 2 * 4096 * 32 + 32 * 128 * 4096
    assert nine.body == 8 * attends + 24 * recurs + 32 * 3 * 4096 * 12_288 == 6_918_504_448
    assert nine.head == 248_320 * 4096
    assert nine.lora == 58_195_968
    assert nine.state_bytes == 24 * (32 * 128 * 128 * 4 + 8192 * 4 * 2) == 51_904_512
    assert nine.attentions == (Attention(None, 8 * 2 * 4 * 256 * 2, 8 * 4 * 16 * 256),)
    assert nine.attentions[0].kv_bytes == 32 * 1024
    assert weights_read(nine) - 2 * nine.lora == pytest.approx(15.9e9, rel=2e-3)


def test_a_decode_step_of_the_9b_model_by_hand(nine: Costs) -> None:
    """Eight rows at contexts of 201 on a device that multiplies for nothing: weights, states twice, keys and values."""
    free = Rates(4.3e12, 1e30)
    moved = 2 * (6_918_504_448 + 248_320 * 4096 + 58_195_968) + 8 * (2 * 51_904_512 + 201 * 32_768)
    assert decode_floor(nine, free, [200] * 8, [2] * 8) == pytest.approx(moved / 4.3e12)
    many = [200] * 4096
    bound = 4096 * 2 * (nine.body + nine.head + nine.lora)
    assert decode_floor(nine, Rates(1e30, 1e12), many, [2] * 4096) == pytest.approx(bound / 1e12, rel=0.01)


@pytest.mark.parametrize(("rates", "step", "decode"), [(H200, 4.57, 4.05), (GB10, 67.9, 63.7)])
def test_a_step_of_v49(nine: Costs, rates: Rates, step: float, decode: float) -> None:
    """1023 decode steps of 16.0 GB of weights and 8 rows of 0.127 GB; the prompt once: 8,392 tokens in the update."""
    floor = step_floor(nine, rates, V49, reference=True)
    assert floor.step == pytest.approx(step, rel=2e-3) and floor.decode == pytest.approx(decode, rel=2e-3)
    body, tokens, said = 6_918_504_448, 200 + 8 * 1024, 8 * 1024
    pairs = 8 * (1224 * 1225 // 2) - 7 * (200 * 201 // 2)
    mixing = tokens * 24 * 8 * 32 * 128 * 128 + pairs * 131_072
    train = tokens * (4 * body + 6 * 58_195_968) + 3.5 * mixing + said * 4 * 248_320 * 4096
    forward = tokens * (2 * body + 2 * 58_195_968) + mixing + said * 2 * 248_320 * 4096
    assert floor.train == pytest.approx(train / rates.matmul)
    assert floor.reference == pytest.approx(forward / rates.matmul)


@pytest.mark.parametrize(("rates", "step"), [(H200, 4.7), (GB10, 68.6)])
def test_a_step_of_v49_with_the_prompt_once_a_completion(nine: Costs, rates: Rates, step: float) -> None:
    work = Work((200,) * 8, tuple(range(8)), (1024,) * 8, (True,) * 8)
    assert step_floor(nine, rates, work, reference=True).step == pytest.approx(step, abs=0.05)


def test_rows_of_one_prompt_share_it_and_train_it_if_one_of_them_trains() -> None:
    costs, rates = Costs(10, 0, 0, 1, 0, 0, ()), Rates(1e9, 1.0)

    def train(*trained: bool) -> float:
        return step_floor(costs, rates, Work((3, 5), (0, 0, 1), (2, 4, 1), trained), reference=False).train

    assert train(False, False, False) == 20 * (3 + 2 + 4 + 5 + 1)
    assert train(True, False, False) == 40 * (3 + 2) + 20 * (4 + 5 + 1)
    assert train(False, False, True) == 20 * (3 + 2 + 4) + 40 * (5 + 1)


def test_what_a_step_need_not_do_is_not_counted(nine: Costs) -> None:
    whole = step_floor(nine, H200, V49, reference=True)
    alone = step_floor(nine, H200, V49, reference=False)
    assert alone.reference == 0 and alone.train == whole.train and alone.rollout == whole.rollout
    silent = step_floor(nine, H200, Work((200,), (0,) * 8, (1024,) * 8, (False,) * 8), reference=False)
    assert silent.train == pytest.approx(whole.reference), "log-probabilities alone"
    assert step_floor(nine, H200, V49, reference=True, inner_epochs=3).train == pytest.approx(3 * whole.train)
    more = step_floor(nine, H200, V49, reference=True, dropped=[1024] * 8)
    assert whole.decode < more.decode < 1.1 * whole.decode and more.update == whole.update


def test_rows_that_end_cost_no_more() -> None:
    """Four bytes of state a row, two of them a token: three rows, then one, of ten bytes of weights."""
    costs = Costs(10, 0, 0, 1, 2, 0, ())
    assert decode_floor(costs, Rates(1.0, 1e9), [1, 1, 1], [2, 2, 4]) == (10 + 3 * 4) + 2 * (10 + 4)


def test_a_window_bounds_keys_and_attention() -> None:
    costs = Costs(0, 0, 0, 1, 0, 0, (Attention(None, 1, 1), Attention(3, 10, 100)))
    assert decode_floor(costs, Rates(1.0, 1e9), [2], [4]) == (3 + 30) + (4 + 30) + (5 + 30)
    assert forward_flops(costs, 5, 0) == 15 + 100 * (1 + 2 + 3 + 3 + 3)
    assert train_flops(costs, 5, 0) == 3.5 * forward_flops(costs, 5, 0)


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
LINEAR = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)


@pytest.mark.parametrize("config", [Qwen3Config(**SIZES), LlamaConfig(**SIZES, tie_word_embeddings=True)])
def test_a_model_of_full_attention(config: Any) -> None:
    from transformers import AutoModelForCausalLM

    with META:
        costs = costs_of(AutoModelForCausalLM.from_config(config))
    every = Attention(None, 2 * 2 * 2 * 16 * 4, 2 * 4 * 4 * 16)
    assert costs == Costs(LINEAR, 300 * 64, 0, 4, 0, 0, (every,))


def test_a_model_with_a_sliding_window() -> None:
    from transformers import AutoModelForCausalLM

    with META:
        costs = costs_of(AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, sliding_window=7)))
    one = {"kv_bytes": 2 * 2 * 16 * 4, "flops": 4 * 4 * 16}
    assert costs.body == LINEAR and costs.attentions == (Attention(None, **one), Attention(7, **one))


def test_the_adapter_is_counted_apart(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(r=4)
    costs = costs_of(policy.model.get_base_model())
    assert costs.lora == sum(p.numel() for p in policy.adapter_parameters().values())
    total = sum(p.numel() for p in policy.model.parameters())
    assert 0 < total - costs.body - costs.lora - 2 * costs.head < 5000, "norms, convolutions and gates"


@pytest.mark.parametrize("name", RANDOM_SHAPES)
def test_a_random_base_has_the_shape_it_is_planned_with(name: str) -> None:
    base, _ = build_random_model(name, device=META, dtype=torch.bfloat16)
    assert sum(p.numel() for p in base.parameters()) == base_parameter_count(RANDOM_SHAPES[name])
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16} and base.dtype == torch.bfloat16
    assert base.config.vocab_size == 248_320 and not base.config.tie_word_embeddings


def test_a_step_is_read_off_its_groups_and_its_batch() -> None:
    def group(prompt: int, *lengths: int) -> Any:
        rows = [SimpleNamespace(ids=(1,) * n) for n in lengths]
        return SimpleNamespace(prompt=SimpleNamespace(ids=(1,) * prompt), completions=rows)

    weights = torch.tensor([[0.2, 0.2, 0, 0, 0], [0.0] * 5, [0.1, 0, 0, 0, 0], [0.1, 0, 0, 0, 0]])  # the second: masked
    batch = SimpleNamespace(advantages=torch.tensor([1.0, -1.0, 0.0, 0.0]), token_weights=weights)
    dropped = (SimpleNamespace(lengths=(4, 4)),)
    step: Any = SimpleNamespace(groups=(group(3, 2, 5), group(6, 1, 1)), batch=batch, replaced_groups=dropped)
    costs, rates = Costs(100, 10, 1, 2, 8, 3, (Attention(None, 2, 4),)), Rates(1e3, 1e4)

    def floor(beta: str, work: Work, **more: Any) -> None:
        config = load_config("configs/tiny.toml", [f"loss.beta={beta}", "optim.inner_epochs=2"])[0]
        expected = step_floor(costs, rates, work, inner_epochs=2, dropped=[4, 4], **more)
        assert floor_of(step, config, costs, rates) == expected

    floor("0.04", Work((3, 6), (0, 0, 1, 1), (2, 5, 1, 1), (True, False, True, True)), reference=True)
    floor("0.0", Work((3, 6), (0, 0, 1, 1), (2, 5, 1, 1), (True, False, False, False)), reference=False)


def test_the_rates_are_those_of_a_machine() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32, 1 << 20)
    assert 1e7 < rates.bandwidth < 1e14 and 1e7 < rates.matmul < 1e16


class Products(TorchDispatchMode):
    """Records the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.operands += args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matmul_rate_is_measured_on_the_same_random_numbers_every_time(dtype: torch.dtype) -> None:
    measured = []
    for _ in range(2):
        with Products() as products:
            measure_rates(torch.device("cpu"), dtype, 1 << 12)
        measured.append(products.operands[0])
        for operand in products.operands:
            assert operand.dtype == dtype and torch.equal(operand, measured[0])
    assert torch.equal(*measured)
    values = measured[0].float()
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert values.std(0).min() > 0.3 and values.std(1).min() > 0.3, "no row or column is constant"


def test_measuring_draws_no_noise() -> None:
    before = torch.get_rng_state()
    measure_rates(torch.device("cpu"), torch.float32, 1 << 12)
    assert torch.equal(before, torch.get_rng_state())
