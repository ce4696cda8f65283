"""World for tests: forked from one server that has imported everything, so that a rank costs no start of its own.

A job is a function of this module; it runs in a process whose environment is as ``torchrun`` makes it.
"""

import dataclasses
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.hf_file_system  # noqa: F401 — this and the like: once in the server, not in every rank
import numpy as np
import peft  # noqa: F401
import torch
import torch._dynamo
import transformers.models.qwen3_5.modeling_qwen3_5  # noqa: F401

from grpo import rollout as rollout_module
from grpo import train as train_module
from grpo import update as update_module
from grpo.batch import group_advantages, make_batch
from grpo.policy.policy import Policy
from grpo.rollout import rollout
from grpo.run import setup
from grpo.runtime import distributed as ranks_module
from grpo.runtime.distributed import World, exit_process, init_world
from grpo.train import main
from grpo.types import Batch, Completion, Group
from tests.conftest import policy_on
from tests.test_rollout import keys_of, prompts_of
from tests.test_update import REWARDS, config_with, gradients

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.ranked"])
PATIENCE_S = 240.0
"""For a job on a busy machine; one that takes longer hangs."""
Rows = list[tuple[list[int], list[float]]]


class Job:
    """The ranks of one job, while they run."""

    def __init__(self, size: int, job: Callable[..., Any], *given: Any, log: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
        self._ends = [end for end, _ in pipes]
        self.processes = [
            CONTEXT.Process(target=_be_rank, args=(rank, size, port, log, pipes[rank][1], job, given), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()
        for _, end in pipes:
            end.close()

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def results(self) -> list[Any]:
        """What the job returned on each rank; None where it did not."""
        found = []
        deadline = time.monotonic() + PATIENCE_S
        for end, process in zip(self._ends, self.processes, strict=True):
            try:
                found.append(end.recv() if end.poll(max(0.0, deadline - time.monotonic())) else None)
            except EOFError:
                found.append(None)
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                raise TimeoutError("a rank hangs")
        return found


def on_ranks(size: int, job: Callable[..., Any], *given: Any, log: Path | None = None) -> list[Any]:
    """What a job returns on each of ``size`` ranks."""
    return Job(size, job, *given, log=log).results()


def _be_rank(rank: int, size: int, port: int, log: Path | None, end: Any, job: Callable[..., Any], given: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if log:
        said = os.open(log / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
    faulthandler.dump_traceback_later(PATIENCE_S / 2)
    end.send(job(*given))
    end.close()
    sys.stdout.flush()


def train(argv: list[str]) -> int:
    """A whole run; its exit code."""
    return main(argv)


def one_step(base: Path, asked: list[tuple[tuple[str, ...], str]]) -> dict[str, Any]:
    """Three groups sampled and one update, once for each of ``asked``: overrides of the config and a fault."""
    with init_world("cpu", timeout_s=60) as ranks:
        policy = policy_on(base, ranks=ranks)
        prompts = prompts_of(policy)
        keys, mine = keys_of(prompts, 4), ranks.slice_of(3)
        own = rollout(policy, [prompts[i] for i in mine], [keys[i] for i in mine], max_new_tokens=20, temperature=1.0)
        told = ranks.all_gather_object([(c.ids, c.sampler_logprobs) for group in own for c in group.completions])
        rows = [(list(ids), list(logprobs)) for part in told for ids, logprobs in part]
        updates = []
        for overrides, fault in asked:
            config = config_with(*overrides)
            batch = make_batch(
                groups_of(policy, rows), group_advantages(groups_of(policy, rows), REWARDS, config.advantage), config
            )
            with FAULTS[fault]():
                updates.append(updated(policy, batch, config))
        return {"rank": ranks.rank, "rows": rows, "updates": updates}


def updated(policy: Policy, batch: Batch, config: Any) -> dict[str, Any]:
    """What the optimiser was handed, and what was recorded."""
    seen: list[Any] = []
    true_update = update_module.update_policy

    def remembers(*given: Any, **named: Any) -> Any:
        seen.append(true_update(*given, **named))
        return seen[-1]

    grads = {name: grad.numpy() for name, grad in gradients(policy, batch, config, run=remembers).items()}
    done = seen[0]
    tokens = {f.name: getattr(done.logprobs, f.name) for f in dataclasses.fields(done.logprobs)}
    return {
        "grads": grads,
        "advantages": batch.advantages.numpy(),
        "weights": batch.token_weights.numpy(),
        "tokens": {name: value.numpy() for name, value in tokens.items() if value is not None},
        "figures": np.array(done.figures),
    }


def groups_of(policy: Policy, rows: Rows) -> list[Group]:
    """Three groups of four."""
    completions = [Completion(tuple(ids), tuple(lps), ids[-1] in policy.end_token_ids, "") for ids, lps in rows]
    return [Group(prompt, tuple(completions[4 * b : 4 * b + 4])) for b, prompt in enumerate(prompts_of(policy))]


def train_slowly(argv: list[str], seconds: float) -> int:
    """A whole run with a pause before every update, so that something can happen to it there."""
    true_update = train_module.update_policy

    def later(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return true_update(*given, **named)

    train_module.update_policy = later
    return main(argv)


def train_otherwise(argv: list[str], overrides: list[str], fault: str = "") -> int:
    """A whole run, of which rank 1 has other overrides or a planted fault."""
    if os.environ["RANK"] != "1":
        return main(argv)
    with FAULTS[fault]():
        return main([*argv, *overrides])


def train_and_leave(argv: list[str], fault: str) -> None:
    """As `train_otherwise`, and then the end of the process."""
    exit_process(train_otherwise(argv, [], fault))


def told_apart(values: list[list[float]]) -> tuple[list[float], str, str]:
    """Return the sum of each rank's values, and the error for values that differ."""
    with init_world("cpu", timeout_s=60) as ranks:
        flat = torch.tensor(values[ranks.rank])
        ranks.all_reduce_(flat)
        ranks.check_identical({"same": {"on": "all"}})
        try:
            rollout_section = {"n": min(ranks.rank, 1), "t": 1.0}
            ranks.check_identical({"torch": "2", "rollout": rollout_section, "base": [ranks.rank == 3]})
        except ranks_module.UserError as error:
            return flat.tolist(), type(error).__name__, str(error)
        return flat.tolist(), "", ""


def hang(seconds: float) -> str:
    """Rank 1 stops answering; what rank 0 is told."""
    with init_world("cpu", timeout_s=2) as ranks:
        ranks.all_gather_object("here")
        if ranks.rank == 1:
            time.sleep(seconds)
            os._exit(0)
        try:
            ranks.all_gather_object("still here")
        except ranks_module.RankLost as error:
            return str(error)
        return "an answer"


class _Patched:
    """A planted fault: an attribute replaced while it is entered."""

    def __init__(self, where: Any = None, true: Any = None, make: Callable[[Any], Any] | None = None) -> None:
        self._where, self._name, self._make = where, getattr(true, "__name__", ""), make

    def __enter__(self) -> None:
        if self._make:
            self._true = getattr(self._where, self._name)
            setattr(self._where, self._name, self._make(self._true))

    def __exit__(self, *_: object) -> None:
        if self._make:
            setattr(self._where, self._name, self._true)


def _summed_twice(true: Any) -> Any:
    def twice(ranks: World, flat: torch.Tensor) -> None:
        true(ranks, flat)
        true(ranks, flat)

    return twice


def _averaged(true: Any) -> Any:
    def mean(ranks: World, flat: torch.Tensor) -> None:
        true(ranks, flat)
        flat /= ranks.size

    return mean


def _unshared(true: Any) -> Any:
    return lambda ranks, parameters, loss: loss


def _last_rows_forgotten(true: Any) -> Any:
    return lambda *given: (lambda rows: range(rows.start, max(rows.start, rows.stop - 1)))(true(*given))


def _all_rows_everywhere(true: Any) -> Any:
    return lambda policy, batch, config: range(len(batch.completion_ids))


def _stops_in(step: int) -> Callable[[Any], Any]:
    def prompts_for_step(true: Any) -> Any:
        def stops(*given: Any) -> Any:
            if given[4] == step:
                os.kill(os.getpid(), signal.SIGSTOP)
            return true(*given)

        return stops

    return prompts_for_step


def _signalled_before_update(update: int) -> Callable[[Any], Any]:
    def make_batch(true: Any) -> Any:
        made: list[Any] = []

        def signalled(*given: Any) -> Any:
            made.append(true(*given))
            if len(made) == update:
                os.kill(os.getpid(), signal.SIGTERM)
            return made[-1]

        return signalled

    return make_batch


def _one_weight_off(true: Any) -> Any:
    def load(*given: Any, **named: Any) -> Policy:
        policy: Policy = true(*given, **named)
        with torch.no_grad():
            next(p for p in policy.model.parameters() if not p.requires_grad).view(-1)[-1] += 0.5
        return policy

    return load


def _drifting(true: Any) -> Any:
    def update(policy: Policy, *given: Any, **named: Any) -> Any:
        done = true(policy, *given, **named)
        with torch.no_grad():
            next(iter(policy.adapter_parameters().values())).view(-1)[0] += 1e-6
        return done

    return update


def _dies_at_the_checkpoint(true: Any) -> Any:
    def check_identical(ranks: World, value: Any) -> None:
        if "adapter" in value:
            os._exit(1)
        true(ranks, value)

    return check_identical


def _full_in(call: int) -> Callable[[Any], Any]:
    """Let the device be full from the ``call``-th call on."""

    def make(true: Any) -> Any:
        calls: list[int] = []

        def full(*given: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) >= call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return true(*given, **named)

        return full

    return make


FAULTS: dict[str, Callable[[], _Patched]] = {
    "": _Patched,
    "summed twice": lambda: _Patched(World, World.all_reduce_, _summed_twice),
    "divided by the ranks": lambda: _Patched(World, World.all_reduce_, _averaged),
    "gradients not summed": lambda: _Patched(World, World.all_reduce_gradients, _unshared),
    "a row forgotten": lambda: _Patched(update_module, update_module.rank_rows, _last_rows_forgotten),
    "every rank trains all rows": lambda: _Patched(update_module, update_module.rank_rows, _all_rows_everywhere),
    "stopped in the second rollout": lambda: _Patched(train_module, train_module.prompts_for_step, _stops_in(1)),
    "signalled before the second update": lambda: _Patched(
        train_module, train_module.make_batch, _signalled_before_update(2)
    ),
    "another base": lambda: _Patched(setup, setup.load_policy, _one_weight_off),
    "another adapter": lambda: _Patched(train_module, train_module.update_policy, _drifting),
    "full in the second rollout": lambda: _Patched(rollout_module, rollout_module.rollout, _full_in(2)),
    "full in the second update": lambda: _Patched(update_module, update_module.forward_backward, _full_in(2)),
    "dies at the checkpoint": lambda: _Patched(World, World.check_identical, _dies_at_the_checkpoint),
}
WRONG_SUMS = tuple(FAULTS)[:6]
"""Those that spoil a gradient; the others are for one rank of a run."""
