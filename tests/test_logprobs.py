"""The shift and the log-probabilities. Tests that take only `maths` are also run on faulty copies."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import oracles
from tests.support.maths_modules import REAL, Maths

CHUNKS = (1, 3, 4, 1024)
TEMPERATURES = (0.7, 1.0, 1.3)


@pytest.fixture
def maths() -> Maths:
    return REAL


def head_and_states(seed: int, tokens: int = 7, width: int = 5, vocabulary: int = 11):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(tokens, width)), rng.normal(size=(vocabulary, width))
    targets = rng.integers(0, vocabulary, tokens)
    targets[:2] = 0, vocabulary - 1
    return (
        torch.tensor(hidden),
        torch.tensor(head),
        torch.tensor(targets),
        torch.tensor(rng.normal(size=vocabulary)),
    )


def ragged_ids(seed: int, rows: int = 5):
    """Prompts and completions over ids 0..5, so that every pad id is also a real token."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 6, int(rng.integers(1, 5))).tolist() for _ in range(rows)]
    completions = [rng.integers(0, 6, int(rng.integers(1, 6))).tolist() for _ in range(rows)]
    return prompts, completions


def causal_states(input_ids: Tensor, embedding: Tensor) -> Tensor:
    """A causal model of one line: the state at s is tanh of the sum of the embeddings up to s."""
    return embedding[input_ids].cumsum(1).tanh()


# --- the shift ----------------------------------------------------------------------------------------------


def test_join_by_hand(maths: Maths) -> None:
    joined = maths.logprobs.join([[5, 6, 7], [8]], [[1], [2, 3]], pad_id=9)
    assert joined.input_ids.tolist() == [[5, 6, 7, 1], [8, 2, 3, 9]]
    assert joined.attention_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert joined.predicts.tolist() == [[2, 0], [0, 1]]
    assert joined.completion_ids.tolist() == [[1, 9], [2, 3]]
    assert joined.completion_mask.tolist() == [[True, False], [True, True]]
    assert joined.input_ids.dtype == joined.predicts.dtype == joined.completion_ids.dtype == torch.long


def test_predicting_position_is_the_one_before(maths: Maths) -> None:
    for seed, pad_id in itertools.product(range(5), (0, 3)):
        prompts, completions = ragged_ids(seed)
        joined = maths.logprobs.join(prompts, completions, pad_id)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            line, count = joined.input_ids[i].tolist(), len(prompt) + len(completion)
            assert line == [*prompt, *completion, *[pad_id] * (len(line) - count)]
            assert joined.attention_mask[i].tolist() == [s < count for s in range(len(line))]
            width = max(len(row) for row in completions)
            assert joined.completion_mask[i].tolist() == [t < len(completion) for t in range(width)]
            assert joined.completion_ids[i, : len(completion)].tolist() == completion
            for t, token in enumerate(completion):
                assert line[int(joined.predicts[i, t]) + 1] == token
                assert int(joined.predicts[i, t]) == len(prompt) - 1 + t
        assert joined.predicts.min() >= 0 and joined.predicts.max() < joined.input_ids.shape[1]


def test_logprobs_of_a_causal_model_alone_and_in_a_batch(maths: Maths) -> None:
    """Forward and gradient: log p(token | everything before it), whatever stands beside it in the batch."""
    rng = np.random.default_rng(1)
    embedding, head = torch.tensor(rng.normal(size=(6, 4))), torch.tensor(rng.normal(size=(6, 4)))
    prompts, completions = ragged_ids(2)

    def score(rows: list[int], table: Tensor) -> Tensor:
        some = maths.logprobs.join([prompts[i] for i in rows], [completions[i] for i in rows], pad_id=0)
        states = maths.logprobs.predicting_states(causal_states(some.input_ids, table), some)
        targets = some.completion_ids[some.completion_mask]
        values, _ = maths.logprobs.token_logprobs(states, head, targets, temperature=1.3, chunk_tokens=3)
        return maths.logprobs.unpack_tokens(values, some.completion_mask)

    leaf = embedding.clone().requires_grad_()
    together = score(list(range(len(prompts))), leaf)
    alone_grads = torch.zeros_like(embedding)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        one = embedding.clone().requires_grad_()
        alone = score([i], one)
        alone_grads += torch.autograd.grad(alone.sin().sum(), one)[0]
        torch.testing.assert_close(together[i, : len(completion)], alone[0], rtol=1e-12, atol=1e-12)
        assert (together[i, len(completion) :] == 0).all()
        for t, token in enumerate(completion):
            prefix = [*prompt, *completion[:t]]
            state = [math.tanh(sum(embedding[k, d].item() for k in prefix)) for d in range(4)]
            expected = oracles.log_softmax(oracles.logits(state, head.tolist(), None), 1.3)[token]
            assert together[i, t].item() == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(together.sin().sum(), leaf)
    torch.testing.assert_close(grad, alone_grads, rtol=1e-10, atol=1e-12)


def test_spread(maths: Maths) -> None:
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    values = torch.arange(1.0, 7.0, dtype=torch.float64, requires_grad=True)
    out = maths.logprobs.unpack_tokens(values, mask)
    assert out.tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]] and out.dtype == torch.float64
    (grad,) = torch.autograd.grad((out * torch.arange(9.0).reshape(3, 3)).sum(), values)
    assert grad.tolist() == [0, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="one value per True"):
        maths.logprobs.unpack_tokens(values[:5], mask)


# --- the log-probabilities ----------------------------------------------------------------------------------


def test_values_and_entropies_match_the_oracle(maths: Maths) -> None:
    hidden, head, targets, offset = head_and_states(3)
    for temperature, chunk, bias in itertools.product(TEMPERATURES, CHUNKS, (None, offset)):
        values, entropies = maths.logprobs.token_logprobs(
            hidden, head, targets, temperature=temperature, chunk_tokens=chunk, bias=bias
        )
        for m, target in enumerate(targets.tolist()):
            line = None if bias is None else bias.tolist()
            log_p = oracles.log_softmax(oracles.logits(hidden[m].tolist(), head.tolist(), line), temperature)
            assert values[m].item() == pytest.approx(log_p[target], rel=1e-10)
            assert entropies[m].item() == pytest.approx(oracles.entropy(log_p), rel=1e-10)


def test_gradient_matches_the_oracle(maths: Maths) -> None:
    hidden, head, targets, bias = head_and_states(4)
    for temperature in TEMPERATURES:
        leaf = hidden.clone().requires_grad_()
        values, _ = maths.logprobs.token_logprobs(
            leaf, head, targets, temperature=temperature, chunk_tokens=3, bias=bias
        )
        (grad,) = torch.autograd.grad(values.sum(), leaf)
        for m, target in enumerate(targets.tolist()):
            expected = oracles.logprob_slope(hidden[m].tolist(), head.tolist(), bias.tolist(), target, temperature)
            assert grad[m].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_any_loss_of_the_logprobs_gets_the_gradient_of_an_unchunked_softmax(maths: Maths) -> None:
    """A ratio of the whole sequence too: exp of a mean of logprobs is not a sum over tokens."""
    hidden, head, targets, bias = head_and_states(5)

    def sequence_level(values: Tensor) -> Tensor:
        return values.mean().exp() * 2 + values[:3].sum().square()

    for temperature, chunk in itertools.product(TEMPERATURES, CHUNKS):
        leaf, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        values, entropies = maths.logprobs.token_logprobs(
            leaf, head, targets, temperature=temperature, chunk_tokens=chunk, bias=bias
        )
        full = torch.log_softmax((other @ head.T + bias) / temperature, dim=-1)
        expected = full[torch.arange(len(targets)), targets]
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
        assert values.requires_grad and not entropies.requires_grad
        (grad,) = torch.autograd.grad(sequence_level(values), leaf)
        (reference,) = torch.autograd.grad(sequence_level(expected), other)
        torch.testing.assert_close(grad, reference, rtol=1e-11, atol=1e-13)


def test_gradcheck(maths: Maths) -> None:
    hidden, head, targets, bias = head_and_states(6, tokens=4, width=3, vocabulary=5)

    def only_values(states: Tensor) -> Tensor:
        return maths.logprobs.token_logprobs(states, head, targets, temperature=0.7, chunk_tokens=3, bias=bias)[0]

    assert torch.autograd.gradcheck(only_values, hidden.requires_grad_(), raise_exception=False)


def test_without_gradient_nothing_is_kept(maths: Maths) -> None:
    hidden, head, targets, _ = head_and_states(7)
    leaf = hidden.clone().requires_grad_()
    expected, entropy = maths.logprobs.token_logprobs(leaf, head, targets, temperature=0.7, chunk_tokens=3)
    with torch.no_grad(), Products(len(head)) as products:
        values, same = maths.logprobs.token_logprobs(leaf, head, targets, temperature=0.7, chunk_tokens=3)
    assert not values.requires_grad and products.count == 3  # one product for each of the three chunks
    assert torch.equal(values, expected.detach()) and torch.equal(same, entropy)
    frozen, _ = maths.logprobs.token_logprobs(hidden, head, targets, temperature=0.7)
    assert not frozen.requires_grad


class Products(TorchDispatchMode):
    """Counts matrix products with the head, and the rows of the largest tensor as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.count, self.rows = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and self.vocabulary in (*args[0].shape, *args[1].shape):
            self.count += 1
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == self.vocabulary:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_two_products_a_chunk_and_one_chunk_of_logits(maths: Maths) -> None:
    hidden, head, targets, _ = head_and_states(8, tokens=21, vocabulary=29)
    leaf = hidden.clone().requires_grad_()
    with Products(29) as products:
        values, _ = maths.logprobs.token_logprobs(leaf, head, targets, temperature=1.0, chunk_tokens=8)
        values.sum().backward()
    assert products.count == 2 * math.ceil(21 / 8)
    assert products.rows == 8


def test_bfloat16_head(maths: Maths) -> None:
    hidden, head, targets, _ = head_and_states(9, tokens=64, width=32, vocabulary=50)
    leaf = hidden.bfloat16().requires_grad_()
    values, entropies = maths.logprobs.token_logprobs(
        leaf, head.bfloat16(), targets % 50, temperature=1.3, chunk_tokens=10
    )
    assert values.dtype == entropies.dtype == torch.float32
    exact = leaf.detach().double().requires_grad_()
    expected, _ = maths.logprobs.token_logprobs(exact, head.bfloat16().double(), targets % 50, temperature=1.3)
    assert (values - expected).abs().max() < 0.08  # logits near 15 carry a bfloat16 step of 1/16
    values.exp().sum().backward()
    expected.exp().sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(leaf.grad.double().flatten(), exact.grad.flatten(), 0) > 0.999


def test_large_logits_stay_finite(maths: Maths) -> None:
    hidden, head, targets, _ = head_and_states(10)
    leaf = (hidden.float() * 1e4).requires_grad_()
    values, entropies = maths.logprobs.token_logprobs(leaf, head.float(), targets, temperature=0.7)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    assert all(torch.isfinite(t).all() for t in (values, entropies, grad))
    assert (values <= 0).all() and (entropies >= 0).all()


def test_no_tokens(maths: Maths) -> None:
    _, head, _, _ = head_and_states(11)
    leaf = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    values, entropies = maths.logprobs.token_logprobs(leaf, head, torch.zeros(0, dtype=torch.long), temperature=1.0)
    assert values.shape == entropies.shape == (0,)
    values.sum().backward()
    assert leaf.grad.shape == (0, 5)


def test_inputs_are_not_written_to(maths: Maths) -> None:
    tensors = head_and_states(12)
    kept = [t.clone() for t in tensors]
    hidden, head, targets, bias = tensors
    maths.logprobs.token_logprobs(hidden.requires_grad_(), head, targets, temperature=0.7, bias=bias)
    maths.logprobs.log_distribution(head, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_sampling_and_scoring_speak_of_the_same_distribution(maths: Maths) -> None:
    hidden, head, _, bias = head_and_states(13)
    for temperature in TEMPERATURES:
        law = maths.logprobs.log_distribution(hidden @ head.T + bias, temperature)
        torch.testing.assert_close(law.exp().sum(-1), torch.ones(7, dtype=torch.float64))
        for target in range(len(head)):
            same = torch.full((7,), target)
            values, _ = maths.logprobs.token_logprobs(hidden, head, same, temperature=temperature, bias=bias)
            torch.testing.assert_close(law[:, target], values, rtol=1e-12, atol=1e-13)
    assert maths.logprobs.log_distribution(head.bfloat16(), 1.0).dtype == torch.float32


def test_refusals(maths: Maths) -> None:
    hidden, head, targets, bias = head_and_states(14)
    good = {"hidden": hidden, "head_weight": head, "targets": targets, "temperature": 1.0, "bias": bias}
    for changed, message in (
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": -1.0}, "temperature > 0"),
        ({"temperature": math.nan}, "temperature > 0"),
        ({"temperature": math.inf}, "temperature > 0"),
        ({"chunk_tokens": 0}, "chunk_tokens >= 1"),
        ({"hidden": hidden[:, :-1]}, "expected hidden"),
        ({"hidden": hidden[0]}, "expected hidden"),
        ({"targets": targets[:-1]}, "targets"),
        ({"targets": targets.int()}, "targets"),
        ({"bias": bias[:-1]}, "bias"),
        ({"head_weight": head.clone().requires_grad_()}, "frozen head"),
        ({"bias": bias.clone().requires_grad_()}, "frozen head"),
    ):
        with pytest.raises(ValueError, match=message):
            maths.logprobs.token_logprobs(**{**good, **changed})
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature > 0"):
            maths.logprobs.log_distribution(head, temperature)
    for prompts, completions, message in (
        ([], [], "at least one"),
        ([[1]], [[1], [2]], "1 prompts and 2 completions"),
        ([[1], []], [[1], [2]], "row 1"),
        ([[1], [2]], [[], [2]], "row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            maths.logprobs.join(prompts, completions, pad_id=0)


# --- properties, on the module itself -----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 14), st.floats(0.1, 5.0))
def test_any_chunking_gives_the_same(seed: int, tokens: int, chunk: int, temperature: float) -> None:
    hidden, head, targets, _ = head_and_states(seed, tokens=max(tokens, 2))
    results = []
    for size in (chunk, 10_000):
        leaf = hidden.clone().requires_grad_()
        values, entropy = REAL.logprobs.token_logprobs(leaf, head, targets, temperature=temperature, chunk_tokens=size)
        results.append((values, entropy, torch.autograd.grad(values.exp().sum(), leaf)[0]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    values, entropy, _ = results[0]
    assert (values <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(len(head)) + 1e-12).all()


rows = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(rows, rows), min_size=1, max_size=5), st.integers(0, 3))
def test_join_loses_nothing(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> None:
    joined = REAL.logprobs.join([p for p, _ in pairs], [c for _, c in pairs], pad_id)
    for i, (prompt, completion) in enumerate(pairs):
        assert joined.input_ids[i][joined.attention_mask[i]].tolist() == [*prompt, *completion]
        assert joined.completion_ids[i][joined.completion_mask[i]].tolist() == completion
    positions = torch.arange(joined.input_ids.shape[1]).expand_as(joined.input_ids)
    picked = REAL.logprobs.predicting_states(positions[..., None], joined).flatten().tolist()
    assert picked == [len(prompt) - 1 + t for prompt, completion in pairs for t in range(len(completion))]
