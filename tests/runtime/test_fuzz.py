"""A short turn of the fuzzing that `benchmarks/fuzz.py` does for longer: whatever a file holds, only the project's own
named errors come out."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_reads_its_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].read(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutant_is_another_file_of_the_same_kind(name: str) -> None:
    target, rng = TARGETS[name], random.Random(1)
    for seed in target.seeds():
        mutants = [target.mutated(seed, rng) for _ in range(20)]
        assert all(mutant[: target.head] == seed[: target.head] for mutant in mutants)
        assert sum(mutant != seed for mutant in mutants) > 10


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), more=st.integers(0, 3))
def test_only_named_errors_come_out(name: str, seed: int, more: int) -> None:
    target, rng = TARGETS[name], random.Random(seed)
    data = rng.choice(target.seeds())
    for _ in range(1 + more):
        data = target.mutated(data, rng)
    try:
        target.read(data)
    except target.allowed as error:
        assert str(error)


@pytest.mark.parametrize("name", [name for name in TARGETS if name.startswith(("cases", "parser"))])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300))
def test_only_named_errors_come_out_of_noise(name: str, data: bytes) -> None:
    try:
        TARGETS[name].read(data)
    except TARGETS[name].allowed as error:
        assert str(error)


@pytest.mark.parametrize(
    "fault", [ZeroDivisionError("x"), RecursionError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x")]
)
def test_another_error_would_be_seen(fault: Exception) -> None:
    assert not any(issubclass(type(fault), target.allowed) for target in TARGETS.values() if target.allowed)
