"""One TOML file → one frozen `Config`. Imports no torch.

Nothing that changes the maths has a default: the file is the run. Every key is checked before anything is loaded;
an error names the file, the line and the key, and suggests what was meant.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from grpo.runtime.errors import UserError
from rewards.safe_files import Unreadable, clipped, is_regular, parse_toml, read_text

CONFIG_VERSION = 1
"""Raised when a key changes its meaning; a file of another version is refused."""

COLDEST = 1e-6
"""The least temperature above 0: logits divided by less leave float32's range."""

SHIPPED = (Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs")
"""Where the shipped configs lie: beside the package in a checkout, inside it in an installed wheel."""

EMBEDDED = Path(__file__).parent / "tiny"
"""Root of the embedded world: ``embedded:base`` is the folder ``grpo/tiny/base``."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _nameable(name: str) -> str:
    """A file or folder that can be: a name that no system takes is told apart from one that is not there."""
    if not name.isprintable():
        raise ValueError("expected a printable name: it holds a control character or half a surrogate pair")
    if name.startswith("embedded:") and ".." in Path(name).parts:
        raise ValueError("expected a name within the embedded world: it holds ..")
    return name


MOST_ROWS = 2**20
"""Completions of a step."""
MOST = 10_000_000
"""Of anything that is counted: beyond any run, and what is made of so many still ends."""
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
FileName = Annotated[str, Field(max_length=4096), AfterValidator(_nameable)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Thinking = Literal["on", "off"]


def _int_keys(table: object) -> object:
    """TOML keys are strings; the keys of this table are ESI levels."""
    if not isinstance(table, dict):
        return table
    return {int(key) if re.fullmatch("[0-9]", str(key)) else key: value for key, value in table.items()}


def _as_tuple(value: object) -> object:
    """TOML arrays are lists; a frozen config holds tuples."""
    return tuple(value) if isinstance(value, list) else value


class Model(Section):
    name: Annotated[FileName, Field(min_length=1)]
    """A folder, ``embedded:base``, a hub id whose files are already on this machine, or ``random:qwen3.5-9b``: random
    weights of a shape in `grpo.policy.memory_plan.RANDOM`."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    dtype: Literal["auto", "bfloat16", "float32"]
    """Of the frozen base: "auto" is bfloat16 on CUDA and float32 on a CPU. The adapter is always float32."""
    gradient_checkpointing: bool
    kernels: Literal["auto", "plain"] = "auto"
    """On CUDA "auto" decodes with Triton's kernels and trains with flash-linear-attention's, where they are installed
    and pass `grpo.run.self_check`; "plain" takes neither. CUDA graphs are used with both."""
    shard: bool = False
    """With more than one rank, each holds a part of the decoder layers' weights (FSDP2) instead of all of them."""


class Lora(Section):
    r: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
    warm_start: FileName
    """A PEFT adapter folder to start from; "" starts from a fresh adapter (B = 0)."""

    @field_validator("target_modules")
    @classmethod
    def _each_once(cls, named: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"named more than once: {', '.join(twice)}")
        return named


class Cases(Section):
    format: Literal["jsonl", "mietic-validate", "mimic-iv-ed"]
    """Of the files that name none: ``mietic-validate:data/samples.csv`` says its own."""
    train: FileName
    strict: bool = True
    """Refuse a file for any faulty row; false leaves such rows out, counted and reported by `grpo preflight`."""
    oversample: Annotated[
        dict[Annotated[int, Field(ge=1, le=5)], Annotated[int, Field(ge=1, le=1000)]], BeforeValidator(_int_keys)
    ]
    """How many times a case of this level stands in the training stream; levels left out stand once."""
    system_prompt: Annotated[str, Field(min_length=1)]


class Rollout(Section):
    prompts_per_step: Positive
    group_size: Annotated[int, Field(ge=2)]
    max_new_tokens: Positive
    """The token budget of one completion, thinking included."""
    temperature: Annotated[float, Field(ge=COLDEST)]
    thinking: Literal["on", "off", "mixed"]
    """"mixed": half of a step's prompts think, the other half answer at once."""
    refill_rounds: Count
    """How many times a step may draw further cases in place of groups whose rewards are all equal, which teach
    nothing; 0 keeps them. What is still without variance after the last round stays in the batch."""
    ignore_end: bool = False
    """End tokens end nothing: every completion is as long as the budget, and counts as cut by it. For benchmarks, as
    other engines' ``ignore_eos``; evaluations always stop at an end token."""


class Overlong(Section):
    """The soft overlong penalty of DAPO, arXiv 2503.14476: 0 up to ``max_new_tokens − cache_tokens``, then falling
    in a line to ``−penalty`` at the budget."""

    cache_tokens: Positive
    penalty: Annotated[float, Field(gt=0)]


class RewardSection(Section):
    set: Annotated[FileName, Field(min_length=1)]
    """A shipped set ("v49") or the path of a TOML file."""
    overlong: Overlong | None = None
    """A length term on top of the set; the proof covers it."""
    allow_unsound: bool = False
    """Train although `grpo.preflight.checks` refuses this reward for this run."""
    reason: str = ""
    """Why that is wanted; it stays in the run's config.json."""

    @model_validator(mode="after")
    def _unsound_for_a_reason(self) -> "RewardSection":
        if self.allow_unsound != bool(self.reason.strip()):
            raise ValueError("allow_unsound = true and a reason belong together: give both or neither")
        return self


class Advantage(Section):
    kind: Literal["group", "none", "batch", "leave_one_out"]
    epsilon: Annotated[float, Field(ge=0)]
    ddof: Literal[0, 1]
    truncated_in_baseline: bool
    """Whether completions that the budget cut count in their group's mean and std. If not, their advantage is 0."""


class Loss(Section):
    surrogate: Literal["clip", "dual_clip", "gspo", "cispo", "none"]
    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Annotated[float, Field(gt=0)]
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Only with ``surrogate = "dual_clip"``."""
    token_weights: Literal["sequence", "token", "constant"]
    mask_truncated: bool
    """Completions that the budget cut weigh nothing: neither surrogate nor KL, and they are in no denominator."""
    kl: Literal["k1", "k2", "k3", "ratio_k3"]
    beta: Annotated[float, Field(ge=0)]
    reference: Literal["base", "warm_start"]

    @model_validator(mode="after")
    def _dual_clip_has_its_constant(self) -> "Loss":
        if (self.surrogate == "dual_clip") != (self.dual_clip is not None):
            raise ValueError('dual_clip belongs to surrogate = "dual_clip": give both or neither')
        return self


def _tokens(value: object) -> object:
    """One message where pydantic would have one for each member of the union."""
    if value is not None and value != "auto" and not (type(value) is int and value > 0):
        raise ValueError('expected a whole number of tokens above 0, or "auto"')
    return value


class Optim(Section):
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Count
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    epsilon: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    inner_epochs: Positive
    """μ: optimiser steps on one batch of completions."""
    micro_batch_size: Positive
    """Rows in one forward and backward, at most. Changes memory and speed, never the gradient."""
    micro_batch_tokens: Annotated[int | Literal["auto"] | None, BeforeValidator(_tokens)] = None
    """Tokens in one forward and backward, at most; "auto" is what free memory allows, and then the cut, and with it the
    rounding of the gradient, is no longer a function of the config."""


class Train(Section):
    steps: Positive
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    max_skipped_steps: Count
    """So many non-finite steps in a row are skipped; one more stops the run."""
    rank_timeout_s: Positive = 600
    """With more than one rank: one that keeps the others waiting for so long ends the run."""


class Checkpoint(Section):
    every: Positive
    keep: Positive


class Ledger(Section):
    """What every k-th step writes down for `grpo replay`, `grpo inspect` and `grpo report`; changes no number."""

    every: Count = 1
    """0 writes none."""
    text: Literal["full", "redacted", "off"] = "full"
    """"redacted": case ids, levels and rules without any text or token id; "off": numbers alone. With both, the answers
    of the evaluations are written without their words as well; their case ids stay."""


class Evaluate(Section):
    ends: dict[Name, FileName]
    """Sets evaluated before and after training: name → file."""
    during: dict[Name, FileName]
    """Sets evaluated every ``every`` steps as well."""
    every: Positive
    thinking: Annotated[tuple[Thinking, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
    max_new_tokens: Positive
    temperature: Annotated[float, Field(ge=0)]
    """0 is greedy; otherwise at least `COLDEST`."""
    batch_size: Positive

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Evaluate":
        if both := sorted(set(self.ends) & set(self.during)):
            raise ValueError(f"a set is either in ends or in during, {', '.join(both)} is in both")
        return self

    @model_validator(mode="after")
    def _sampling_can_be_done(self) -> "Evaluate":
        if 0 < self.temperature < COLDEST:
            raise ValueError(
                f"temperature = {self.temperature:g}: expected 0, which is greedy, or at least {COLDEST:g}"
            )
        if len(set(self.thinking)) < len(self.thinking):
            raise ValueError("thinking names a mode twice")
        return self


class Config(Section):
    version: Literal[1]
    name: Name
    model: Model
    lora: Lora
    cases: Cases
    rollout: Rollout
    reward: RewardSection
    advantage: Advantage
    loss: Loss
    optim: Optim
    train: Train
    checkpoint: Checkpoint
    ledger: Ledger = Ledger()
    evaluate: Evaluate

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> "Config":
        rows = self.rollout.prompts_per_step * self.rollout.group_size
        if rows > MOST_ROWS:
            raise ValueError(f"rollout: {rows:,} completions a step are more than {MOST_ROWS:,}, which no step can be")
        if self.optim.micro_batch_size > rows:
            raise ValueError(
                f"optim.micro_batch_size = {self.optim.micro_batch_size} is more than the {rows} completions of a step "
                f"(rollout.prompts_per_step {self.rollout.prompts_per_step} × group_size {self.rollout.group_size})"
            )
        if self.model.shard and self.optim.micro_batch_tokens == "auto":
            raise ValueError(
                'optim.micro_batch_tokens = "auto" measures each rank by itself, but with model.shard = true all ranks '
                "cut alike: give a number"
            )
        if self.reward.overlong and self.reward.overlong.cache_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong.cache_tokens = {self.reward.overlong.cache_tokens} is more than "
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens}"
            )
        if self.loss.reference == "warm_start" and not self.lora.warm_start:
            raise ValueError('loss.reference = "warm_start" needs lora.warm_start to name an adapter')
        if self.optim.warmup_steps >= self.train.steps * self.optim.inner_epochs:
            raise ValueError("optim.warmup_steps leaves no step at the full learning rate")
        return self


@dataclass(frozen=True, slots=True)
class Source:
    """Where a config came from: kept beside the resolved values, so that a run can be read again."""

    path: Path
    text: str
    overrides: tuple[str, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Source]:
    """The checked config of a TOML file, with ``section.key=value`` overrides laid over it.

    A path that does not exist but names a shipped config (``configs/tiny.toml``) is found in the installed package.

    Raises:
        UserError: one line per fault, each with file, line and key.
    """
    file = _find(Path(path))
    try:
        text = read_text(file)
        table = parse_toml(text)
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
    if table.get("version") != CONFIG_VERSION or isinstance(table["version"], bool | float):
        raise UserError(
            f"{file}{_at(text, ('version',))}: version = {clipped(table.get('version'))}, but this program reads "
            f"config version {CONFIG_VERSION}: compare with a shipped config, then set version = {CONFIG_VERSION}"
        )
    for override in overrides:
        _lay_over(table, override)
    try:
        return Config.model_validate(table), Source(file, text, tuple(overrides))
    except ValidationError as error:
        set_here = {tuple(o.split("=", 1)[0].strip().split(".")) for o in overrides}
        raise UserError("\n".join(_explain(file, text, set_here, fault) for fault in error.errors())) from None


def notes(text: str) -> dict[str, str]:
    """The comments of a config's TOML by dotted key: what stands behind a value, and in lines of their own after it.

    The shipped configs begin them with a grade (KNOWN, INFERRED, UNKNOWN) or with what differs from their parent.

    >>> notes('''[train]
    ... steps = 300   # KNOWN
    ... name = "a # b"
    ...               # a choice of ours''')
    {'train.steps': 'KNOWN', 'train.name': 'a choice of ours'}
    """
    # one that never closes takes the rest: looked for anew at every quote, it would cost time quadratic in the text
    strings = r'"""(?:\\.|[^\\])*?(?:"""|\Z)|' + r"'''.*?(?:'''|\Z)|" + r'"(?:\\.|[^"\\\n])*+"?|' + r"'[^'\n]*+'?"
    bare = re.sub(
        rf"{strings}|(#[^\n]*)", lambda m: m[1] or re.sub(r"[^\n]", "x", m[0]), text, flags=re.DOTALL
    )  # what is inside a string can no longer look like a key or a comment
    section, key = "", ""
    found: dict[str, str] = {}
    for line in bare.splitlines():
        code, _, comment = line.partition("#")
        if header := re.match(r"\s*+\[([^\[\]]++)\]\s*+$", code):
            section, key = f"{header[1].strip()}.", ""
        elif pair := re.match(r"\s*+([A-Za-z0-9_.-]++)\s*+=", code):
            key = section + pair[1]
        elif line.startswith("#") or not line.strip():
            key = ""
        if key and comment.strip():
            found[key] = f"{found.get(key, '')} {comment.strip()}".strip()
    return found


def embedded(name: str) -> Path | None:
    """The path behind ``embedded:NAME``, or None for any other name.

    >>> embedded("embedded:base").name
    'base'
    >>> embedded("runs/x/adapter") is None
    True
    """
    return EMBEDDED / name.removeprefix("embedded:") if name.startswith("embedded:") else None


def resolve(name: str) -> Path:
    """The path that a config's file or folder name stands for; relative names start at the current folder."""
    try:
        return embedded(name) or Path(name).expanduser()
    except RuntimeError:  # "~nobody": no such user here
        return Path(name)


def _find(path: Path) -> Path:
    if is_regular(path):
        return path
    for folder in SHIPPED:
        shipped = folder.joinpath(*path.parts[1:])
        if path.parts[:1] == ("configs",) and ".." not in path.parts and is_regular(shipped):
            return shipped
    names = {f"configs/{file.relative_to(folder)}" for folder in SHIPPED for file in folder.rglob("*.toml")}
    raise UserError(f"{path}: no such config; shipped with this program: {', '.join(sorted(names))}")


def _lay_over(table: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected section.key=value, for example train.steps=2")
    if "\n" in value:
        raise UserError(f"--set {override!r}: one key and one value on one line")
    if any("\ud800" <= c <= "\udfff" for c in override):
        raise UserError(f"--set {override!r}: not UTF-8")
    if len(keys) > 4:
        raise UserError(f"--set {clipped(key)}: expected section.key, got {len(keys)} parts")
    try:
        parsed = parse_toml(f"v = {value}")["v"]
    except Unreadable:
        parsed = value.strip()
    for part in keys[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section")
    table[keys[-1]] = parsed


def _at(text: str, keys: tuple[str, ...]) -> str:
    """``:LINE`` of a key in TOML text, of its section if the key is missing, "" if neither is there."""
    section: tuple[str, ...] = ()
    best, depth = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*+\[++([^\]]*+)\]", line):
            section = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            found = section
        elif pair := re.match(r"\s*+([A-Za-z0-9_.\"'-]++)\s*+=", line):
            found = (*section, *(part.strip("\"'") for part in pair[1].split(".")))
        else:
            continue
        if found == keys[: len(found)] and len(found) > depth:
            best, depth = f":{number}", len(found)
    return best


def _explain(file: Path, text: str, overridden: set[tuple[str, ...]], fault: Any) -> str:
    keys = tuple(str(part) for part in fault["loc"] if part != "[key]")
    name = clipped(".".join(keys), 200)[1:-1]
    laid_over = any(keys[: len(o)] == o or o[: len(keys)] == keys for o in overridden) and bool(keys)
    where = "--set" if laid_over else f"{file}{_at(text, keys)}"
    if fault["type"] == "extra_forbidden":
        known = _fields(keys[:-1])
        close = difflib.get_close_matches(keys[-1][:80], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key {name}; {hint}"
    if fault["type"] == "missing":
        return f"{where}: {name} is missing: nothing that changes a run has a default"
    message = fault["msg"].removeprefix("Value error, ")
    got = f", got {clipped(fault['input'])}" if keys and not isinstance(fault["input"], dict) else ""
    return f"{where}: {name + ': ' if name else ''}{message}{got}"


def _fields(section: tuple[str, ...]) -> list[str]:
    model: Any = Config
    for part in section:
        model = model.model_fields[part].annotation
        model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), model)  # "Section | None"
    return list(model.model_fields) if hasattr(model, "model_fields") else []
