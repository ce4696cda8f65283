"""Faults, and runs that come through them. The tests run a few; by hand, as many as asked:

    python -m tests.support.faults --kills 200 --record benchmarks/faults.json

A parent loads a small Qwen3.5 once and forks a child for every attempt, so that an attempt costs no start. The child
is `grpo.train.main` with three things put in: the loaded model, rewards that vary (a function of each completion's ids,
since so short a budget lets nothing parse), and the fault. Then a child without the fault resumes, and what it leaves
must be, byte for byte, what a run without any fault leaves; of ``metrics.jsonl`` and the model card all but time and
memory, of ``config.json`` all but when the run started.

The parent never computes a gradient itself: autograd refuses to work in a child of a process that has.
"""

import argparse
import dataclasses
import errno
import json
import os
import random
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from tqdm import tqdm

from grpo import dynamic_sampling as groups
from grpo import train as train_module
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.evaluation import during_training
from grpo.run import checkpoint as checkpoint_module
from grpo.runtime import interrupts as stop_module
from grpo.train import main

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
COST = ("time/", "tokens_per_s/", "roofline/", "memory/")
EVENTS = ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir", "truncate", "ftruncate")
"""System calls of Python that change what is on the disk; safetensors' own writing is the event "save_file"."""
WRITES = ("open", "write", "fsync", "replace", "mkdir", "save_file")
"""Those that a full or failing disk refuses."""
Fault = Callable[[], None]
"""Put into the child before it starts."""


class World:
    """A run short enough to be made hundreds of times, and what it leaves when nothing goes wrong."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        for name, kept in (("cases", lines[:12]), ("test", lines[20:22]), ("validation", lines[30:32])):
            (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
        values = (
            f"model.name={small_base(folder / 'base')}",
            "lora.r=4",
            "lora.warm_start=",
            f"cases.train={folder / 'cases.jsonl'}",
            f'evaluate.before_and_after={{test = "{folder / "test.jsonl"}"}}',
            f'evaluate.periodic={{validation = "{folder / "validation.jsonl"}"}}',
            "evaluate.every=2",
            "evaluate.max_new_tokens=3",
            'evaluate.thinking=["off"]',
            "rollout.prompts_per_step=2",
            "rollout.group_size=2",
            "rollout.max_new_tokens=6",
            "rollout.resample_rounds=1",
            "rollout.thinking=mixed",
            "lora.dropout=0.1",
            "optim.inner_epochs=2",
            "optim.micro_batch_size=3",
            "checkpoint.every=1",
            "train.steps=3",
            "train.max_nonfinite_steps=1",
            *overrides,
        )
        self.argv = [TINY, *(part for value in values for part in ("--set", value))]
        config, _ = load_config(TINY, list(values))
        torch.set_num_threads(1)  # more would be a pool of threads, which a fork does not carry over
        self.setup = train_module.load_setup(config)
        self.started = time.perf_counter()
        assert self.child(folder / "whole") == 0, self.log()
        self.seconds = time.perf_counter() - self.started
        self.whole = tree(folder / "whole")

    def child(self, out: Path, fault: Fault | None = None, *more: str, kill_after: float | None = None) -> int:
        """Exit code of a run in ``out``; negative where a signal killed it."""
        pid = os.fork()
        if not pid:
            self._run(out, fault, more)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    def resumed(self, out: Path, fault: Fault | None = None) -> int:
        """The exit code of going on; a folder in which nothing is yet is started anew."""
        there = out.is_dir() and any(out.iterdir())
        return self.child(out, fault, *(["--resume"] if there else []))

    def log(self) -> str:
        """What the last child said."""
        return (self.folder / "log").read_text(errors="replace")

    def _run(self, out: Path, fault: Fault | None, more: tuple[str, ...]) -> None:
        code = 99
        try:
            # tqdm's lock is shared with the other children: one that is killed while it holds it would stop them all
            tqdm.set_lock(threading.RLock())
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            true_scores = train_module.score_groups
            train_module.load_setup = lambda *_: self.setup
            peft.PeftModel.create_or_update_model_card = lambda *_: None  # a third of the time; it is thrown away
            for module in (train_module, groups):
                module.score_groups = lambda *given: varied(given[1], true_scores(*given))
            if fault:
                fault()
            code = main([*self.argv, "--out", str(out), *more])
        except BaseException:  # the child must end here, whatever it is
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def small_base(folder: Path) -> Path:
    """The embedded base's shape with one layer of each kind, 32 wide, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(TINY_WORLD_DIR / "base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 2, ["linear_attention", "full_attention"]
    config.hidden_size, config.intermediate_size = 32, 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    return folder


def varied(groups: Any, scores: Any) -> Any:
    """The scores with a total of 0, 1 or 2, by the sum of the completion's ids."""
    return tuple(
        tuple(
            dataclasses.replace(
                score,
                total=float(sum(completion.ids) % 3),
                parts=dict.fromkeys(score.parts, 0.0) | {"outcome": float(sum(completion.ids) % 3)},
            )
            for completion, score in zip(group.completions, row, strict=True)
        )
        for group, row in zip(groups, scores, strict=True)
    )


def tree(out: Path) -> dict[str, bytes]:
    """Every file of a run folder by its path, without what two runs cannot share: clocks, and who held the lock."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), name
        if path.is_dir() or name == ".lock":
            continue
        found[name] = path.read_bytes()
    if "metrics.jsonl" in found:
        records = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
        kept = [{k: v for k, v in record.items() if not k.startswith(COST)} for record in records]
        found["metrics.jsonl"] = json.dumps(kept).encode()
    if "adapter/README.md" in found:  # its line of hours and seconds
        lines = found["adapter/README.md"].decode().splitlines()
        found["adapter/README.md"] = "\n".join(line for line in lines if "of rollouts and updates" not in line).encode()
    if "config.json" in found:
        record = json.loads(found["config.json"])
        record.pop("started")
        found["config.json"] = json.dumps(record).encode()
    return found


def differences(found: dict[str, bytes], whole: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))


class Events:
    """What a child does to the disk, counted, with something done at one of the events."""

    def __init__(self, act: Callable[[int, str, Callable[[], Any], tuple[Any, ...]], Any]) -> None:
        self.act = act
        self.count = 0

    def install(self) -> None:
        for name in EVENTS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        for module, name in ((checkpoint_module, "save_file"), (peft.peft_model, "safe_save_file")):
            setattr(module, name, self._watched("save_file", getattr(module, name)))

    def _watched(self, name: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            if name == "open" and not (len(given) > 1 and given[1] & os.O_CREAT):
                return true(*given, **named)  # reading
            self.count += 1
            return self.act(self.count, name, lambda: true(*given, **named), given)

        return watched


def counting(file: Path) -> Fault:
    """Writes the names of all events to ``file`` as they come."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write = os.write

    def act(number: int, name: str, go: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        write(log, f"{name}\n".encode())
        return go()

    return lambda: Events(act).install()


def killed_at(event: int, moment: str) -> Fault:
    """SIGKILL before, in the middle of (half of a write's bytes), or after the n-th event."""
    write = os.write

    def act(number: int, name: str, go: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        if number != event:
            return go()
        if moment == "middle" and name == "write":
            write(given[0], bytes(given[1])[: len(given[1]) // 2])
        elif moment != "before":
            go()
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda: Events(act).install()


def refused(event: int, number_of_error: int) -> Fault:
    """The n-th event of `WRITES`, and all of the same kind after it, fail; a write may take half of its bytes."""
    write, seen = os.write, Counter[str]()

    def act(number: int, name: str, go: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        if name in WRITES:
            seen["all"] += 1
        if name not in WRITES or seen["all"] < event:
            return go()
        if name == "write" and len(given[1]) > 1 and not seen["torn"]:
            seen["torn"] += 1
            return write(given[0], bytes(given[1])[: len(given[1]) // 2])
        if name == "write" and given[0] == 2:
            return go()
        if name == "save_file":
            from safetensors import SafetensorError

            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(number_of_error)} (os error {number_of_error})"
            )
        raise OSError(number_of_error, os.strerror(number_of_error))

    return lambda: Events(act).install()


def limited(size: int) -> Fault:
    """No file may grow beyond ``size`` bytes: the kernel itself refuses, safetensors' writing too."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def power_cut(event: int, out: Path) -> Fault:
    """At the n-th event all that was not synced is lost: what POSIX promises, and no more. A file holds what it held at
    its last fsync, a folder the names that it had at its own. The child lays that out in ``out`` + ".cut" and dies."""
    contents: dict[int, bytes] = {}
    names: dict[int, dict[str, int]] = {}
    open_, held = os.open, []

    def synced(path: Path, inode: int) -> None:
        held.append(open_(path, os.O_RDONLY))  # its number is nobody else's while it is open
        if not path.is_dir():
            contents[inode] = path.read_bytes()
            return
        entries = list(os.scandir(path))
        names[inode] = {entry.name: entry.inode() for entry in entries}
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                names.setdefault(entry.inode(), {})
                held.append(open_(entry.path, os.O_RDONLY))

    def lay(inode: int, target: Path) -> None:
        target.mkdir(mode=0o700)
        for name, inner in names[inode].items():
            if inner in names:
                lay(inner, target / name)
            else:
                (target / name).write_bytes(contents.get(inner, b""))

    def act(number: int, name: str, go: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        if number == event:
            if out.is_dir():
                inode = out.stat().st_ino
                names.setdefault(inode, {})
                lay(inode, out.with_name(f"{out.name}.cut"))
            os.kill(os.getpid(), signal.SIGKILL)
        result = go()
        if name == "fsync":
            synced(Path(os.readlink(f"/proc/self/fd/{given[0]}")), os.fstat(given[0]).st_ino)
        return result

    return lambda: Events(act).install()


def signalled(event: int, number: int) -> Fault:
    """The signal at the n-th event: in the middle of whatever writes."""

    def act(count: int, name: str, go: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        if count == event:
            os.kill(os.getpid(), number)
        return go()

    return lambda: Events(act).install()


class Campaign:
    """Attempts of one kind after another, and what came of them."""

    def __init__(self, world: World, folder: Path, seed: int) -> None:
        self.world, self.folder, self.random = world, folder, random.Random(seed)
        log = folder / "events"
        assert world.child(folder / "counted", counting(log)) == 0, world.log()
        self.events = log.read_text().split()
        self.writes = sum(name in WRITES for name in self.events)
        self.failures: list[str] = []
        self.taken = 0

    def out(self) -> Path:
        """A folder for the next attempt."""
        self.taken += 1
        return self.folder / f"run-{self.taken}"

    def judge(self, out: Path, what: str) -> bool:
        """Resumes and compares; what differs is a failure."""
        code = self.world.resumed(out)
        told = [f"exit code {code}: {self.world.log()[-2000:]}"] if code else []
        if not told and (unequal := differences(tree(out), self.world.whole)):
            told = [f"differ: {', '.join(unequal)}"]
        if told:
            self.failures.append(f"{what}: {told[0]}")
        shutil.rmtree(out, ignore_errors=True)
        return not told

    def expect(self, wanted: bool, what: str) -> None:
        if not wanted:
            self.failures.append(f"{what}: {self.world.log()[-2000:]}")

    def kills(self, attempts: int) -> dict[str, Any]:
        """SIGKILL: of three, one at a random time and two at a random event; one resume of four is killed as well."""
        where, equal, again, late = Counter[str](), 0, 0, 0
        while where.total() < attempts:
            out, what = self.out(), f"kill {where.total()}"
            if self.random.random() < 1 / 3:
                at = "at a random time"
                code = self.world.child(out, kill_after=self.random.uniform(0, self.world.seconds))
            else:
                event, moment = self._event()
                at = f"{moment} {self.events[event - 1]}"
                code = self.world.child(out, killed_at(event, moment))
            if code == 0:  # it was quicker than the clock
                late += 1
                shutil.rmtree(out)
                continue
            self.expect(code == -signal.SIGKILL, f"{what} {at}: exit code {code}")
            where[at] += 1
            if self.random.random() < 1 / 4:
                event, moment = self._event()
                again += self.world.resumed(out, killed_at(event, moment)) == -signal.SIGKILL
            equal += self.judge(out, f"{what} {at}")
        return {
            "killed": where.total(),
            "resume_killed_too": again,
            "equal": equal,
            "finished_before_the_kill": late,
            "where": dict(sorted(where.items())),
        }

    def power_cuts(self, attempts: int) -> dict[str, Any]:
        """All that was not synced is lost. No checkpoint may be damaged, and no record of before one missing."""
        equal = 0
        for i in range(attempts):
            out, event = self.out(), self._event()[0]
            code = self.world.child(out, power_cut(event, out))
            self.expect(code == -signal.SIGKILL, f"power cut {i} at event {event}: exit code {code}")
            shutil.rmtree(out, ignore_errors=True)
            cut = out.with_name(f"{out.name}.cut")
            if cut.exists():
                cut.rename(out)
            fine = self.judge(out, f"power cut {i} at event {event}")
            self.expect("damaged" not in self.world.log() and "note" not in self.world.log(), f"power cut {i}")
            equal += fine
        return {"cut": attempts, "equal": equal}

    def refusals(self, attempts: int) -> dict[str, Any]:
        """A write, fsync, rename, ... that fails, and all after it: exit code 3 and one error, then a resume."""
        equal, kinds = 0, Counter[str]()
        for i in range(attempts):
            out, event = self.out(), self.random.randint(1, self.writes)
            number = self.random.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT])
            what = f"refusal {i}: write {event} of {self.writes} fails with {errno.errorcode[number]}"
            code = self.world.child(out, refused(event, number))
            kinds[errno.errorcode[number]] += 1
            self.expect(code == 3, f"{what}: exit code {code}")
            self.expect(self.world.log().count("error: ") == 1 and "Traceback" not in self.world.log(), what)
            equal += self.judge(out, what)
        return {"refused": attempts, "errors": dict(kinds), "equal": equal}

    def full_disks(self, attempts: int) -> dict[str, Any]:
        """A file system of its own that is too small, then made larger: as root only."""
        disk = self.folder / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
            return {"full": 0, "equal": 0, "why": "no file system could be mounted"}
        equal = 0
        used = sum(len(content) for content in self.world.whole.values())
        try:
            for i in range(attempts):
                size, what = self.random.randint(4096, used), f"full disk {i}"
                subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
                out = disk / f"run-{i}"
                code = self.world.child(out)
                self.expect(code == 3 and "make room" in self.world.log(), f"{what} of {size}: exit code {code}")
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                equal += self.judge(out, f"{what} of {size}")
        finally:
            subprocess.run(["umount", disk], check=True)
        return {"full": attempts, "equal": equal}

    def file_limits(self, attempts: int) -> dict[str, Any]:
        """The kernel refuses to let any file grow beyond a random size."""
        equal = 0
        largest = max(len(content) for content in self.world.whole.values())
        for i in range(attempts):
            out, size = self.out(), self.random.randint(100, largest - 1)
            code = self.world.child(out, limited(size))
            self.expect(code == 3 and "Traceback" not in self.world.log(), f"limit {i} of {size}: exit code {code}")
            equal += self.judge(out, f"limit {i} of {size}")
        return {"limited": attempts, "equal": equal}

    def damages(self, attempts: int) -> dict[str, Any]:
        """A file of the last checkpoint torn, emptied, zeroed, with a bit flipped, gone: named, and the one before is
        used. Checkpoints of which none is whole: refused, and nothing is touched."""
        section = self.world.setup.config
        last = (section.train.steps - 1) // section.checkpoint.every * section.checkpoint.every
        stopped, before_last = self._stopped_after(last), f"step_{last - section.checkpoint.every:06d}"
        names = ("manifest.json", *checkpoint_module.CHECKPOINT_FILES)
        every = [(name, how) for name in names for how in DAMAGES]
        chosen = [every[i % len(every)] for i in self.random.sample(range(attempts), attempts)]
        equal = 0
        for name, how in chosen:
            out, what = self.out(), f"{name} {how}"
            shutil.copytree(stopped, out)
            DAMAGES[how](out / "checkpoints" / f"step_{last:06d}" / name, self.random)
            equal += self.judge(out, what)
            prefixes = ("warning: checkpoint ", "resume ")
            told = [line for line in self.world.log().splitlines() if line.startswith(prefixes)]
            # a flipped bit of the manifest may sit in what it says of another file
            named = f"step_{last:06d} is damaged ({'' if (name, how) == ('manifest.json', 'flipped') else name}"
            self.expect(len(told) == 2 and named in told[0] and before_last in told[1], f"{what}: not named")
        out = self.out()
        shutil.copytree(stopped, out)
        for path in (out / "checkpoints").glob("*/state.json"):
            DAMAGES["flipped"](path, self.random)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
        self.expect(self.world.resumed(out) == 2 and "start again from step 0" in self.world.log(), "none is whole")
        after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
        self.expect(before == after, "none is whole: something was touched")
        return {"damaged": len(chosen), "kinds": len(set(chosen)), "equal": equal}

    def signals(self, attempts: int) -> dict[str, Any]:
        """SIGINT, SIGTERM, SIGHUP at a random event: the customary exit code, every completed step kept."""
        equal, kept = 0, 0
        for i in range(attempts):
            out, event = self.out(), self._event()[0]
            number = self.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
            what = f"signal {i}: {number.name} at event {event}"
            code = self.world.child(out, signalled(event, number))
            if code == 0:  # after the last step's evaluation nothing can be stopped any more
                code = 128 + number
            self.expect(code == 128 + number, f"{what}: exit code {code}")
            done = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
            saved = max((int(p.name[5:]) for p in (out / "checkpoints").glob("step_*")), default=0)
            self.expect(saved == done, f"{what}: {done} steps done, {saved} kept")
            kept += saved == done
            equal += self.judge(out, what)
        return {"signalled": attempts, "every_step_kept": kept, "equal": equal}

    def scenes(self, attempts: int) -> dict[str, Any]:
        """What chance may miss: each scene once, whatever the number asked for."""
        before = len(self.failures)
        for scene in SCENES:
            scene(self, self.out())
        return {"scenes": len(SCENES), "failures": len(self.failures) - before}

    def _event(self) -> tuple[int, str]:
        return self.random.randint(1, len(self.events)), self.random.choice(["before", "middle", "after"])

    def _stopped_after(self, step: int) -> Path:
        """A run killed right after the checkpoint of a step, when its evaluation begins."""
        out = self.folder / "stopped"

        def fault() -> None:
            true = train_module.evaluate_if_due

            def due(setup: Any, run: Any, at: int) -> None:
                if at == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                true(setup, run, at)

            train_module.evaluate_if_due = due

        assert self.world.child(out, fault) == -signal.SIGKILL, self.world.log()
        return out


def second_run(campaign: Campaign, out: Path) -> None:
    """A second run in a folder where one is at work is refused, names it, and touches nothing. Then the first one is
    killed, and its lock blocks nobody."""
    world = campaign.world
    first = os.fork()
    if not first:
        world._run(out, standing_still("prompts_for_step", out), ())
    waited(out.with_suffix(".still"))
    before = tree(out)
    for more in ((), ("--resume",)):
        code = world.child(out, None, *more)
        refused_by = "already exists" if not more else f"in use by process {first}"
        campaign.expect(code == 2 and refused_by in world.log(), f"second run {more}: exit code {code}")
    campaign.expect(tree(out) == before, "second run: something was touched")
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    campaign.judge(out, "second run, after the first was killed")


def hung_update(campaign: Campaign, out: Path) -> None:
    """An update that does not end: SIGTERM twice in a moment is one SIGTERM; what has begun has its grace; one more
    later leaves at once."""
    world = campaign.world
    for grace, again in ((0.5, False), (60.0, True)):
        pid = os.fork()
        if not pid:
            stop_module.GRACE_PERIOD_S = grace
            world._run(out, standing_still("update_policy", out), ("--resume",) if out.exists() else ())
        waited(out.with_suffix(".still"))
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
        if again:
            time.sleep(stop_module.DUPLICATE_WINDOW_S + 0.2)
            os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        code, told = os.waitstatus_to_exitcode(status), "quitting now" in world.log()
        campaign.expect(code == 128 + signal.SIGTERM and told == again, f"hung update, again={again}: exit code {code}")
        campaign.expect(again or "Resume with: python -m grpo train" in world.log(), "hung update: no hint")
    campaign.judge(out, "hung update")


def written_evaluations(campaign: Campaign, out: Path) -> None:
    """What was evaluated before a kill is not evaluated again."""
    asked = out.with_suffix(".asked")

    def fault(last: int) -> Fault:
        def put() -> None:
            true = during_training.evaluate

            def evaluate(policy: Any, cases: Any, config: Any, **how: Any) -> Any:
                with asked.open("a") as file:
                    file.write(how["name"] + "\n")
                if len(asked.read_text().split()) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return true(policy, cases, config, **how)

            during_training.evaluate = evaluate

        return put

    campaign.expect(campaign.world.child(out, fault(2)) == -signal.SIGKILL, "evaluation: not killed in the second")
    campaign.expect(campaign.world.resumed(out, fault(0)) == 0, "evaluation: not resumed")
    names = asked.read_text().split()
    wanted = Counter(p.name.split("_")[2] for p in (campaign.folder / "counted" / "eval").iterdir())
    campaign.expect(Counter(names) == wanted + Counter({names[1]: 1}), f"evaluated {Counter(names)} for {wanted}")
    campaign.judge(out, "evaluation")


def skipped_steps(campaign: Campaign, out: Path) -> None:
    """Steps that are not finite, in a row across a kill: the run stops where an uninterrupted one does."""
    world = campaign.world
    every, allowed = world.setup.config.checkpoint.every, world.setup.config.train.max_nonfinite_steps

    def fault(kill: bool) -> Fault:
        def put() -> None:
            true, due = train_module.update_policy, train_module.evaluate_if_due

            def update(*given: Any, **named: Any) -> Any:
                return dataclasses.replace(true(*given, **named), skipped=1)

            def evaluate_if_due(setup: Any, run: Any, step: int) -> None:
                if kill and step == every:
                    os.kill(os.getpid(), signal.SIGKILL)
                due(setup, run, step)

            train_module.update_policy, train_module.evaluate_if_due = update, evaluate_if_due

        return put

    for place, kills in ((out, (False,)), (out.with_suffix(".parts"), (True, False))):
        codes = [world.resumed(place, fault(kill)) for kill in kills]
        told = f"step {allowed + 1}: {allowed + 1} steps in a row had a loss or gradient that is not finite"
        campaign.expect(codes[-1] == 2 and told in world.log(), f"skipped steps: exit codes {codes}")
    whole, parts = tree(out), tree(out.with_suffix(".parts"))
    campaign.expect(whole == parts, f"skipped steps: differ: {differences(whole, parts)}")


def right_after_a_checkpoint(campaign: Campaign, out: Path) -> None:
    """Killed between a checkpoint's rename and whatever comes next: all that it comes after must be on the disk."""

    def act(number: int, name: str, go: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        result = go()
        if name == "replace" and Path(given[1]).name.startswith("step_0") and Path(given[1]).is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    code = campaign.world.child(out, Events(act).install)
    campaign.expect(code == -signal.SIGKILL, f"right after a checkpoint: exit code {code}")
    campaign.judge(out, "right after a checkpoint")


SCENES = (second_run, hung_update, written_evaluations, skipped_steps, right_after_a_checkpoint)


def standing_still(name: str, out: Path) -> Fault:
    """From the second call on, a function of the loop does not return, and says so by a file."""

    def put() -> None:
        true, calls = getattr(train_module, name), [0]

        def still(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] < 2:
                return true(*given, **named)
            out.with_suffix(".still").touch()
            while True:
                time.sleep(0.01)

        setattr(train_module, name, still)

    return put


def waited(file: Path) -> None:
    """Until the file is there; it is taken away."""
    while not file.exists():
        time.sleep(0.01)
    file.unlink()


def _flip(path: Path, chosen: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], Any]] = {
    "torn": lambda path, chosen: os.truncate(path, chosen.randrange(1, path.stat().st_size)),
    "emptied": lambda path, chosen: os.truncate(path, 0),
    "zeroed": lambda path, chosen: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": _flip,
    "gone": lambda path, chosen: path.unlink(),
}
WORLDS: dict[str, tuple[str, ...]] = {
    "each step": (),
    "every other": (
        "checkpoint.every=2",
        "ledger.every=2",
        "train.seed=7",
        "ledger.text=redacted",
        "train.steps=5",
        "train.max_nonfinite_steps=2",  # one of them lies behind a checkpoint: they are counted across a resume
    ),
}
"""A checkpoint and a ledger record each step, or each other; evaluations, refills and two inner epochs in both."""


def main_of_campaign() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, default in KINDS.items():
        parser.add_argument(f"--{kind.replace('_', '-')}", type=int, default=default, metavar="N")
    parser.add_argument("--world", choices=WORLDS, default="each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="JSON, one entry a world; kinds that were not asked for stay in it")
    arguments = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        world = World(Path(folder) / "world", *WORLDS[arguments.world])
        campaign = Campaign(world, Path(folder), arguments.seed)
        found: dict[str, Any] = {"events_of_a_run": dict(Counter(campaign.events))}
        for kind in KINDS:
            if attempts := getattr(arguments, kind):
                found[kind] = getattr(campaign, kind)(attempts)
                print(f"{kind:<12} {found[kind]} ({time.time() - started:.0f} s)", flush=True)
    for failure in campaign.failures:
        print(f"FAILED  {failure}")
    print(f"{len(campaign.failures)} failures")
    if arguments.record:
        record = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
        before = record.get(arguments.world, {"commands": [], "failures": []})
        record[arguments.world] = {
            "commands": [*before["commands"], "python -m tests.support.faults " + shlex.join(sys.argv[1:])],
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "failures": [*before["failures"], *campaign.failures],
            **{kind: value for kind, value in before.items() if kind in KINDS},
            **found,
        }
        arguments.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if campaign.failures else 0


KINDS = {
    "kills": 200,
    "power_cuts": 40,
    "refusals": 40,
    "full_disks": 10,
    "file_limits": 5,
    "damages": 25,
    "signals": 30,
    "scenes": 1,
}
"""Kind of fault → how many by default."""

if __name__ == "__main__":
    sys.exit(main_of_campaign())
