"""The config of a run: one TOML file → one frozen `Config`. Imports no torch.

Nothing that changes the maths has a default, except switches that are off: the file is the run. Every key is checked
before anything is loaded; an error names the file, the line and the key, and suggests a correction.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
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
from rewards.safe_files import InvalidFile, is_regular, parse_toml, read_text, shorten

CONFIG_VERSION = 2
"""Incremented when a key changes its meaning; a file of another version is refused."""

RENAMED_KEYS = {
    "evaluate.ends": "evaluate.before_and_after",
    "evaluate.during": "evaluate.periodic",
    "rollout.refill_rounds": "rollout.resample_rounds",
    "rollout.ignore_end": "rollout.ignore_eos",
    "train.max_skipped_steps": "train.max_nonfinite_steps",
    "reward.reason": "reward.unsound_reason",
}
"""Keys of config version 1 → their names in version 2."""

MIN_TEMPERATURE = 1e-6
"""Lowest temperature above 0: logits divided by less exceed float32's range."""

SHIPPED_CONFIG_DIRS = (Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs")
"""Folders of the shipped configs: beside the package in a checkout, inside it in an installed wheel."""

TINY_WORLD_DIR = Path(__file__).parent / "tiny"
"""Root of the embedded world: ``embedded:base`` is the folder ``grpo/tiny/base``."""


class StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _check_printable(name: str) -> str:
    """Return the name of a file or folder if it can exist."""
    if not name.isprintable():
        raise ValueError("expected a printable name, without control characters or lone surrogates")
    if name.startswith("embedded:") and ".." in Path(name).parts:
        raise ValueError("expected a name within the embedded world, without ..")
    return name


MAX_ROWS_PER_STEP = 2**20
"""Upper bound on the completions of a step."""
MAX_COUNT = 10_000_000
"""Upper bound on every count: more than any run needs, and little enough that nothing sized by it exhausts memory."""
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PathName = Annotated[str, Field(max_length=4096), AfterValidator(_check_printable)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
ThinkingMode = Literal["on", "off"]


def _int_keys(table: object) -> object:
    """Convert keys to ESI levels; those of a TOML table are strings."""
    if not isinstance(table, dict):
        return table
    return {int(key) if re.fullmatch("[0-9]", str(key)) else key: value for key, value in table.items()}


def _as_tuple(value: object) -> object:
    """Convert a TOML array, which is a list, to the tuple of a frozen config."""
    return tuple(value) if isinstance(value, list) else value


class ModelSection(StrictModel):
    name: Annotated[PathName, Field(min_length=1)]
    """A folder, ``embedded:base``, a hub id whose files are already on this machine, or a model with random weights of
    a shape in `grpo.policy.memory_plan.RANDOM_SHAPES`, such as ``random:qwen3.5-9b``."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    dtype: Literal["auto", "bfloat16", "float32"]
    """Data type of the frozen base: "auto" is bfloat16 with CUDA, else float32. The adapter is always float32."""
    gradient_checkpointing: bool
    kernels: Literal["auto", "plain"] = "auto"
    """With CUDA, "auto" decodes with Triton kernels and trains with flash-linear-attention's, if they are installed
    and pass `grpo.run.self_check`; "plain" uses neither. CUDA graphs are used with both."""


class LoraSection(StrictModel):
    r: PositiveInt
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
    warm_start: PathName
    """A PEFT adapter folder to start from; "" starts from a fresh adapter (B = 0)."""

    @field_validator("target_modules")
    @classmethod
    def _check_unique(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"duplicates: {', '.join(duplicates)}")
        return names


class CasesSection(StrictModel):
    format: Literal["jsonl", "mietic-validate", "mimic-iv-ed"]
    """Format of the files without a prefix of their own, such as ``mietic-validate:data/samples.csv``."""
    train: PathName
    strict: bool = True
    """Refuse a file with any faulty row. If false, such rows are dropped, counted and reported by `grpo preflight`."""
    oversample: Annotated[
        dict[Annotated[int, Field(ge=1, le=5)], Annotated[int, Field(ge=1, le=1000)]], BeforeValidator(_int_keys)
    ]
    """How many times each case of a level occurs in the training stream; 1 for levels not listed."""
    system_prompt: Annotated[str, Field(min_length=1)]


class RolloutSection(StrictModel):
    prompts_per_step: PositiveInt
    group_size: Annotated[int, Field(ge=2)]
    max_new_tokens: PositiveInt
    """The token budget of one completion, thinking included."""
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE)]
    thinking: Literal["on", "off", "mixed"]
    """"mixed": half of a step's prompts think, the other half answer directly."""
    resample_rounds: NonNegativeInt
    """How many times a step may replace groups whose rewards are all equal, which have no gradient, by further cases; 0
    keeps them. Groups without variance after the last round stay in the batch."""
    ignore_eos: bool = False
    """Sample past end tokens, so that every completion uses the whole budget and counts as truncated. For benchmarks,
    like ``ignore_eos`` of other engines; evaluations always stop at an end token."""


class OverlongSection(StrictModel):
    """The soft overlong penalty of DAPO, arXiv 2503.14476: 0 up to ``max_new_tokens − cache_tokens``, then falling
    linearly to ``−penalty`` at the budget."""

    cache_tokens: PositiveInt
    penalty: Annotated[float, Field(gt=0)]


class RewardSection(StrictModel):
    set: Annotated[PathName, Field(min_length=1)]
    """A shipped set ("v49") or the path of a TOML file."""
    overlong: OverlongSection | None = None
    """A length term added to the set's reward; the proof covers it."""
    allow_unsound: bool = False
    """Train even if `grpo.preflight.checks` refuses this reward for this run."""
    unsound_reason: str = ""
    """Why ``allow_unsound`` is set; recorded in the run's config.json."""

    @model_validator(mode="after")
    def _check_reason(self) -> "RewardSection":
        if self.allow_unsound != bool(self.unsound_reason.strip()):
            raise ValueError("allow_unsound = true requires a reason and vice versa: set both or neither")
        return self


class AdvantageSection(StrictModel):
    kind: Literal["group", "mean_only", "batch", "leave_one_out"]
    epsilon: Annotated[float, Field(ge=0)]
    ddof: Literal[0, 1]
    truncated_in_baseline: bool
    """Whether truncated completions count in their group's mean and std. If not, their advantage is 0."""


class LossSection(StrictModel):
    surrogate: Literal["clip", "dual_clip", "gspo", "cispo", "none"]
    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Annotated[float, Field(gt=0)]
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Only with ``surrogate = "dual_clip"``."""
    token_weights: Literal["sequence", "token", "constant"]
    mask_truncated: bool
    """Give truncated completions weight 0: in the surrogate, in the KL and in every denominator."""
    kl: Literal["k1", "k2", "k3", "ratio_k3"]
    beta: Annotated[float, Field(ge=0)]
    reference: Literal["base", "warm_start"]

    @model_validator(mode="after")
    def _check_dual_clip(self) -> "LossSection":
        if (self.surrogate == "dual_clip") != (self.dual_clip is not None):
            raise ValueError('dual_clip requires surrogate = "dual_clip" and vice versa: set both or neither')
        return self


class OptimSection(StrictModel):
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: NonNegativeInt
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    epsilon: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    inner_epochs: PositiveInt
    """μ: optimizer steps on one batch of completions."""
    micro_batch_size: PositiveInt
    """Maximum rows per forward and backward pass. Changes memory and speed, never the gradient. Halved for the rest of
    the run whenever a GPU runs out of memory."""
    micro_batch_tokens: PositiveInt | None = None
    """Maximum tokens per forward and backward pass; None for no limit."""


class TrainSection(StrictModel):
    steps: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    max_nonfinite_steps: NonNegativeInt
    """How many non-finite steps in a row are skipped; one more stops the run."""
    rank_timeout_s: PositiveInt = 600
    """Seconds that the ranks wait for each other before the run ends. Unused with one rank."""


class CheckpointSection(StrictModel):
    every: PositiveInt
    keep: PositiveInt


class LedgerSection(StrictModel):
    """What steps record for `grpo replay`, `grpo inspect` and `grpo report`; has no effect on training."""

    every: NonNegativeInt = 1
    """Record each step whose number is a multiple of this; 0 records none."""
    text: Literal["full", "redacted", "off"] = "full"
    """"redacted": case ids, levels and rules without any text or token id; "off": only numbers. With both, the answers
    of the evaluations are written without their text, but with their case ids."""


class EvaluateSection(StrictModel):
    before_and_after: dict[Name, PathName]
    """Name → file of the sets evaluated before and after training."""
    periodic: dict[Name, PathName]
    """Name → file of the sets also evaluated every ``every`` steps."""
    every: PositiveInt
    thinking: Annotated[tuple[ThinkingMode, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0)]
    """0 is greedy; otherwise at least `MIN_TEMPERATURE`."""
    batch_size: PositiveInt

    @model_validator(mode="after")
    def _check_sets_and_sampling(self) -> "EvaluateSection":
        if duplicates := sorted(set(self.before_and_after) & set(self.periodic)):
            raise ValueError(f"{', '.join(duplicates)}: expected in either before_and_after or periodic, found in both")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature = {self.temperature:g}: expected 0 (greedy) or at least {MIN_TEMPERATURE:g}")
        if len(set(self.thinking)) < len(self.thinking):
            raise ValueError("thinking contains a mode twice")
        return self


class Config(StrictModel):
    version: Literal[2]
    name: Name
    model: ModelSection
    lora: LoraSection
    cases: CasesSection
    rollout: RolloutSection
    reward: RewardSection
    advantage: AdvantageSection
    loss: LossSection
    optim: OptimSection
    train: TrainSection
    checkpoint: CheckpointSection
    ledger: LedgerSection = LedgerSection()
    evaluate: EvaluateSection

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Config":
        rows = self.rollout.prompts_per_step * self.rollout.group_size
        if rows > MAX_ROWS_PER_STEP:
            raise ValueError(
                f"rollout: prompts_per_step × group_size = {rows:,} exceeds the maximum of {MAX_ROWS_PER_STEP:,}"
            )
        if self.optim.micro_batch_size > rows:
            raise ValueError(
                f"optim.micro_batch_size = {self.optim.micro_batch_size} exceeds the {rows} completions of a step "
                f"(rollout.prompts_per_step {self.rollout.prompts_per_step} × group_size {self.rollout.group_size})"
            )
        overlong, budget = self.reward.overlong, self.rollout.max_new_tokens
        if overlong and overlong.cache_tokens > budget:
            raise ValueError(
                f"reward.overlong.cache_tokens = {overlong.cache_tokens} exceeds rollout.max_new_tokens = {budget}"
            )
        if self.loss.reference == "warm_start" and not self.lora.warm_start:
            raise ValueError('loss.reference = "warm_start" requires an adapter in lora.warm_start')
        if self.optim.warmup_steps >= self.train.steps * self.optim.inner_epochs:
            raise ValueError("optim.warmup_steps: expected fewer than train.steps × optim.inner_epochs")
        return self


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """Where a config came from; recorded beside the resolved values."""

    path: Path
    text: str
    overrides: tuple[str, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, ConfigSource]:
    """Return the checked config of a TOML file after applying ``section.key=value`` overrides.

    A shipped config (``configs/tiny.toml``) is also found in the installed package.

    Raises:
        UserError: one line per error, each with file, line and key.
    """
    file = _find_config(Path(path))
    try:
        text = read_text(file)
        table = parse_toml(text)
    except InvalidFile as error:
        raise UserError(f"{file}: {error}") from None
    if table.get("version") != CONFIG_VERSION or isinstance(table["version"], bool | float):
        renames = "".join(f"\n  {old} → {new}" for old, new in RENAMED_KEYS.items() if _get(table, old) is not None)
        if _get(table, "advantage.kind") == "none":
            renames += '\n  advantage.kind = "none" → "mean_only"'
        if _get(table, "optim.micro_batch_tokens") == "auto":
            renames += '\n  optim.micro_batch_tokens = "auto" → remove it'
        if _get(table, "model.shard") is not None:
            renames += "\n  model.shard → remove it"
        raise UserError(
            f"{_location(file, text, ('version',))}: version = {shorten(table.get('version'))}, but this program reads "
            f"config version {CONFIG_VERSION}: set version = {CONFIG_VERSION}"
            + (f" and change:{renames}" if renames else "")
        )
    for override in overrides:
        _apply_override(table, override)
    try:
        return Config.model_validate(table), ConfigSource(file, text, tuple(overrides))
    except ValidationError as error:
        overridden = {tuple(o.split("=", 1)[0].strip().split(".")) for o in overrides}
        raise UserError("\n".join(_error_line(file, text, overridden, entry) for entry in error.errors())) from None


def upgrade_recorded_config(recorded: Any) -> Any:
    """Return the config in a run's ``config.json`` in the form of today's version; other values are unchanged.

    ``model.shard`` is dropped: it changed only where the weights were, and a resume could always change it.
    """
    if not isinstance(recorded, dict):
        return recorded
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in recorded.items()}
    if config.get("version") == 1:
        for old, new in RENAMED_KEYS.items():
            (section, old_key), new_key = old.split("."), new.split(".")[1]
            if isinstance(table := config.get(section), dict) and old_key in table:
                table[new_key] = table.pop(old_key)
        if _get(config, "advantage.kind") == "none":
            config["advantage"]["kind"] = "mean_only"
        config["version"] = CONFIG_VERSION
    if isinstance(model := config.get("model"), dict):
        model.pop("shard", None)
    if _get(config, "optim.micro_batch_tokens") == "auto":
        config["optim"]["micro_batch_tokens"] = None
    return config


def _get(table: Mapping[str, Any], dotted: str) -> Any:
    section, key = dotted.split(".")
    inner = table.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


def key_comments(text: str) -> dict[str, str]:
    """Return the comments of a config's TOML by dotted key: those after a value and on the following lines.

    The shipped configs begin them with a grade (KNOWN, INFERRED, UNKNOWN) or the difference from their parent.

    >>> key_comments('''[train]
    ... steps = 300   # KNOWN
    ... name = "a # b"
    ...               # a choice of ours''')
    {'train.steps': 'KNOWN', 'train.name': 'a choice of ours'}
    """
    return {key: comment for key, (_, comment) in _keys(text).items() if comment}


def _keys(text: str) -> dict[str, tuple[int, str]]:
    """Return (line, comment) of each section and key of a TOML text, by dotted name."""
    # an unclosed string extends to the end: searched again from every quote, it would cost quadratic time
    strings = r'"""(?:\\.|[^\\])*?(?:"""|\Z)|' + r"'''.*?(?:'''|\Z)|" + r'"(?:\\.|[^"\\\n])*+"?|' + r"'[^'\n]*+'?"
    bare = re.sub(
        rf"{strings}|(#[^\n]*)", lambda m: m[1] or re.sub(r"[^\n]", "x", m[0]), text, flags=re.DOTALL
    )  # the inside of a string can no longer look like a key or a comment
    section, key = "", ""
    entries: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(bare.splitlines(), 1):
        code, _, comment = line.partition("#")
        if header := re.match(r"\s*+\[++([^\[\]]++)\]", code):
            section, key = header[1].strip(), ""
            entries.setdefault(section, (number, ""))
        elif pair := re.match(r"\s*+([A-Za-z0-9_.-]++)\s*+=", code):
            key = f"{section}.{pair[1]}".removeprefix(".")
            entries[key] = number, ""
        elif line.startswith("#") or not line.strip():
            key = ""
        if key and comment.strip():
            entries[key] = entries[key][0], f"{entries[key][1]} {comment.strip()}".strip()
    return entries


def embedded_path(name: str) -> Path | None:
    """Return the path of ``embedded:NAME``, or None for any other name.

    >>> embedded_path("embedded:base").name
    'base'
    >>> embedded_path("runs/x/adapter") is None
    True
    """
    return TINY_WORLD_DIR / name.removeprefix("embedded:") if name.startswith("embedded:") else None


def resolve_path(name: str) -> Path:
    """Return the path of a file or folder named in a config; relative to the current folder."""
    try:
        return embedded_path(name) or Path(name).expanduser()
    except RuntimeError:  # "~nobody" without such a user
        return Path(name)


def _find_config(path: Path) -> Path:
    if is_regular(path):
        return path
    for folder in SHIPPED_CONFIG_DIRS:
        shipped = folder.joinpath(*path.parts[1:])
        if path.parts[:1] == ("configs",) and ".." not in path.parts and is_regular(shipped):
            return shipped
    names = {f"configs/{file.relative_to(folder)}" for folder in SHIPPED_CONFIG_DIRS for file in folder.rglob("*.toml")}
    raise UserError(f"{path}: no such config; shipped with this program are {', '.join(sorted(names))}")


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected section.key=value, for example train.steps=2")
    if "\n" in value:
        raise UserError(f"--set {override!r}: expected one key and one value on one line")
    if any("\ud800" <= c <= "\udfff" for c in override):
        raise UserError(f"--set {override!r}: expected UTF-8")
    if len(keys) > 4:
        raise UserError(f"--set {shorten(key)}: expected section.key, got {len(keys)} parts")
    try:
        parsed = parse_toml(f"v = {value}")["v"]
    except InvalidFile:
        parsed = value.strip()
    for part in keys[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section")
    table[keys[-1]] = parsed


def _location(file: Path, text: str, keys: tuple[str, ...]) -> str:
    """Return ``FILE:LINE`` of a key in TOML text, or of its section if the key is missing; ``FILE`` if both are."""
    entries = _keys(text)
    names = (".".join(keys[:depth]) for depth in range(len(keys), 0, -1))
    return next((f"{file}:{entries[name][0]}" for name in names if name in entries), str(file))


def _error_line(file: Path, text: str, overridden: set[tuple[str, ...]], entry: Any) -> str:
    """Return the message for one entry of pydantic's `ValidationError.errors`."""
    keys = tuple(str(part) for part in entry["loc"] if part != "[key]")
    name = shorten(".".join(keys), 200)[1:-1]
    is_override = any(keys[: len(o)] == o or o[: len(keys)] == keys for o in overridden) and bool(keys)
    where = "--set" if is_override else _location(file, text, keys)
    if entry["type"] == "extra_forbidden":
        known = _fields(keys[:-1])
        close = difflib.get_close_matches(keys[-1][:80], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        hint = f"it is now {RENAMED_KEYS[name]}" if name in RENAMED_KEYS else hint
        return f"{where}: unknown key {name}; {hint}"
    if entry["type"] == "missing":
        return f"{where}: missing key {name}; every key that affects training must be set explicitly"
    message = entry["msg"].removeprefix("Value error, ")
    got = f", got {shorten(entry['input'])}" if keys and not isinstance(entry["input"], dict) else ""
    return f"{where}: {name + ': ' if name else ''}{message}{got}"


def _fields(section: tuple[str, ...]) -> list[str]:
    """Return the keys of a section."""
    model: Any = Config
    for part in section:
        model = model.model_fields[part].annotation
        model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), model)  # "Section | None"
    return list(model.model_fields) if hasattr(model, "model_fields") else []
