"""Estimate what a run needs from shapes alone: parameters, tokens, completions, bytes. Imports no torch.

Byte counts are formulas over the model's shape with one measured constant per type of device (`ACTIVATION_BYTES`).
Memory fragmentation and the libraries' workspaces are not included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from grpo.config import Config, resolve_path
from rewards.safe_files import InvalidFile, is_regular, read_json

KNOWN_HUB_SHAPES = ("Qwen/Qwen3.5-9B",)
"""Hub ids with the default shape of `ModelShape`: their files are not needed for a plan."""
COUNTABLE_MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
"""Values of ``model_type`` in config.json that `linear_modules` supports."""

CHUNK_TOKENS = 1024
"""Completion tokens per chunk of logits in the update, as in `grpo.logprobs.token_logprobs`."""
ACTIVATION_BYTES = {"cpu": 30, "cuda": 12}
"""Bytes that `grpo.qwen3_5` saves for the backward pass per token, layer, and unit of hidden + feed-forward width.
Measured with small Qwen3.5 shapes on a CPU: 27-30 in float32, 19-22 in bfloat16 (norms and the delta rule are float32
in both). Counted for the 9B on CUDA, where scans are recomputed (`benchmarks/on_paper.py`): 12."""
BYTES_PER_TOKEN = 3
"""Of English triage text, a low estimate: real tokenizers give fewer tokens."""
DEFAULT_NARRATIVE_BYTES = 600
"""Assumed for the longest narrative if no cases are available."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Qwen3.5 model, named as in config.json. The defaults are those of Qwen3.5-9B."""

    vocab_size: int = 248_320
    hidden_size: int = 4096
    intermediate_size: int = 12_288
    num_hidden_layers: int = 32
    full_attention_layers: int = 8
    """The other layers are Gated DeltaNet."""
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    tie_word_embeddings: bool = False

    @property
    def linear_layers(self) -> int:
        return self.num_hidden_layers - self.full_attention_layers

    @property
    def key_width(self) -> int:
        """Width of the keys of a Gated DeltaNet layer, all heads together."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


RANDOM_SHAPES: dict[str, ModelShape] = {
    "random:qwen3.5-9b": ModelShape(),
    "random:qwen3.5-small": ModelShape(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        full_attention_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    ),
}
"""Values of ``model.name`` for random weights (`grpo.policy.random_model`): the 9B, and a decoder small enough for two
CPU cores with the vocabulary of the 9B."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """One line of the memory plan.

    Example: ``MemoryEstimate("KV cache", "rollout", 322_961_408, "32 rows × 616 tokens × 16,384 B")``
    """

    part: str
    phase: str
    """"rollout", "update", or "both"."""
    bytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Size of a run and its estimated memory, computed without reading any weights."""

    prompts: int
    group_size: int
    micro_batches: int
    inner_epochs: int
    steps: int
    max_tokens_per_step: int
    """Upper bound per step: each completion uses the whole budget, each round that replaces groups is full."""
    frozen: int | None
    """Parameters of the base; None if its shape is unknown."""
    trained: int | None
    modules: int | None
    """Number of adapted linear layers."""
    memory: tuple[MemoryEstimate, ...]

    @property
    def rows(self) -> int:
        """Completions per step."""
        return self.prompts * self.group_size

    @property
    def completions(self) -> int:
        return self.steps * self.rows

    def peak(self, phase: str) -> int:
        """Return the estimated peak of a phase [bytes]."""
        return sum(line.bytes for line in self.memory if line.phase in (phase, "both"))


def read_shape(name: str) -> ModelShape | None:
    """Return the shape for ``model.name``: from `RANDOM_SHAPES`, for a known hub id, or from a folder's config.json.

    None if it is unknown, for other architectures, and for invalid files: the loader will report those.

    >>> read_shape("Qwen/Qwen3.5-9B") == ModelShape()
    True
    """
    if name in RANDOM_SHAPES:
        return RANDOM_SHAPES[name]
    file = resolve_path(name) / "config.json"
    if not is_regular(file):
        return ModelShape() if name in KNOWN_HUB_SHAPES else None
    try:
        table = read_json(file, foreign=True)
    except InvalidFile:
        return None
    return _shape(table) if isinstance(table, dict) else None


def _shape(table: Mapping[str, object]) -> ModelShape | None:
    text = table.get("text_config")
    table = text if isinstance(text, dict) else table
    if table.get("model_type") not in COUNTABLE_MODEL_TYPES or table.get("attention_bias"):
        return None
    sizes = {f.name: table[f.name] for f in fields(ModelShape) if type(table.get(f.name)) in (int, bool)}
    layers = table.get("layer_types")
    if isinstance(layers, list):
        sizes["full_attention_layers"] = layers.count("full_attention")
    return ModelShape(**sizes)  # type: ignore[arg-type]


def linear_modules(shape: ModelShape) -> dict[str, tuple[int, int, int]]:
    """Return module name → (number of layers, input width, output width).

    >>> linear_modules(ModelShape())["q_proj"]
    (8, 4096, 8192)
    """
    hidden, heads, head = shape.hidden_size, shape.num_attention_heads, shape.head_dim
    full, linear, every = shape.full_attention_layers, shape.linear_layers, shape.num_hidden_layers
    grouped = shape.num_key_value_heads * head
    return {
        "q_proj": (full, hidden, 2 * heads * head),  # queries and their output gates
        "k_proj": (full, hidden, grouped),
        "v_proj": (full, hidden, grouped),
        "o_proj": (full, heads * head, hidden),
        "in_proj_qkv": (linear, hidden, 2 * shape.key_width + shape.value_width),
        "in_proj_z": (linear, hidden, shape.value_width),
        "in_proj_b": (linear, hidden, shape.linear_num_value_heads),
        "in_proj_a": (linear, hidden, shape.linear_num_value_heads),
        "out_proj": (linear, shape.value_width, hidden),
        "gate_proj": (every, hidden, shape.intermediate_size),
        "up_proj": (every, hidden, shape.intermediate_size),
        "down_proj": (every, shape.intermediate_size, hidden),
    }


def base_parameter_count(shape: ModelShape) -> int:
    """Return the parameters of the text model: Σ in·out over its linear layers, convolutions, norms, embedding, head.

    >>> round(base_parameter_count(ModelShape()) / 1e9, 3)
    8.954
    """
    linear = sum(
        count * in_features * out_features for count, in_features, out_features in linear_modules(shape).values()
    )
    convolution = (2 * shape.key_width + shape.value_width) * shape.linear_conv_kernel_dim
    deltas = convolution + 2 * shape.linear_num_value_heads + shape.linear_value_head_dim
    norms = shape.full_attention_layers * 2 * shape.head_dim + (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return linear + shape.linear_layers * deltas + norms + tables


def lora_parameter_count(shape: ModelShape, targets: Sequence[str], r: int) -> tuple[int, int]:
    """Return (parameters, adapted layers) of a LoRA adapter: Σ r·(in + out) over the targets.

    >>> targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    >>> lora_parameter_count(ModelShape(), targets, 32)
    (58195968, 128)
    """
    adapted = [sizes for name, sizes in linear_modules(shape).items() if name in targets]
    return sum(count * r * (in_features + out_features) for count, in_features, out_features in adapted), sum(
        count for count, _, _ in adapted
    )


def make_plan(config: Config, shape: ModelShape | None, longest_narrative: int | None) -> RunPlan:
    """Return the size of a run, with `estimate_memory` if the model's shape is known.

    Args:
        longest_narrative: UTF-8 bytes of the longest case; None if no case is available.
    """
    rollout = config.rollout
    rows = rollout.prompts_per_step * rollout.group_size
    trained, modules = lora_parameter_count(shape, config.lora.target_modules, config.lora.r) if shape else (None, None)
    narrative = DEFAULT_NARRATIVE_BYTES if longest_narrative is None else longest_narrative
    prompt = -(-(len(config.cases.system_prompt.encode()) + narrative) // BYTES_PER_TOKEN)
    return RunPlan(
        prompts=rollout.prompts_per_step,
        group_size=rollout.group_size,
        micro_batches=-(-rows // config.optim.micro_batch_size),
        inner_epochs=config.optim.inner_epochs,
        steps=config.train.steps,
        max_tokens_per_step=rows * rollout.max_new_tokens * (1 + rollout.resample_rounds),
        frozen=base_parameter_count(shape) if shape else None,
        trained=trained,
        modules=modules,
        memory=estimate_memory(config, shape, prompt) if shape else (),
    )


def estimate_memory(config: Config, shape: ModelShape, prompt_tokens: int) -> tuple[MemoryEstimate, ...]:
    """Return estimated bytes by part, for prompts of ``prompt_tokens`` and completions that use the whole budget.

    With w bytes per weight (2 for bfloat16, 4 for float32; "auto" counts as bfloat16 unless the device is "cpu"),
    R rows decoded together (of a step or an evaluation batch, whichever needs more), m rows per micro-batch,
    S = prompt + budget tokens, V the vocabulary
    size, and a = `ACTIVATION_BYTES`:

        base            w · parameters
        adapter         4 · (weight + gradient + two moments), + 4 for a warm-start reference;  fp32
        KV cache        R · S · w · 2 · full layers · KV heads · head_dim
        DeltaNet state  R · linear layers · (4 · value heads · key dim · value dim + w · convolution width · kernel)
        sampler         R · V · (w + 20):      the last logits, their fp32 logprobs, two fp64 arrays for drawing
        activations     m · S · layers · a · (hidden + ffn);   with gradient checkpointing
                        m · S · (layers · w · hidden + a · (hidden + ffn)): each layer's input, and one complete layer
        logits          min(1024, m · budget) · V · (w + 8):   one chunk, its fp32 logprobs and its gradient

    For Qwen3.5-9B in bfloat16 a row costs 32 KiB of KV per token and 52 MB of state at any length.
    """
    rollout, width = config.rollout, _weight_bytes(config)
    trained, _ = lora_parameter_count(shape, config.lora.target_modules, config.lora.r)
    kv = 2 * shape.full_attention_layers * shape.num_key_value_heads * shape.head_dim * width
    recurrent = 4 * shape.linear_num_value_heads * shape.linear_key_head_dim * shape.linear_value_head_dim
    convolution = width * (2 * shape.key_width + shape.value_width) * shape.linear_conv_kernel_dim
    state = shape.linear_layers * (recurrent + convolution)
    rows, budget = max(
        (rollout.prompts_per_step * rollout.group_size, rollout.max_new_tokens),
        (config.evaluate.batch_size, config.evaluate.max_new_tokens),
        key=lambda cut: cut[0] * ((prompt_tokens + cut[1]) * kv + state),
    )
    length = prompt_tokens + rollout.max_new_tokens
    micro, bound = config.optim.micro_batch_size, config.optim.micro_batch_tokens
    if bound is not None:
        micro = max(1, min(micro, bound // length))
    device = "cpu" if config.model.device == "cpu" else "cuda"
    layer = ACTIVATION_BYTES[device] * (shape.hidden_size + shape.intermediate_size)
    if config.model.gradient_checkpointing:
        saved, how = shape.num_hidden_layers * width * shape.hidden_size + layer, "layer inputs and one complete layer"
    else:
        saved, how = shape.num_hidden_layers * layer, "all layers"
    copies = 5 if config.loss.reference == "warm_start" else 4
    tensors = "weight, gradient, two moments" + (", reference" if copies == 5 else "")
    chunk = min(CHUNK_TOKENS, micro * rollout.max_new_tokens)
    seen = prompt_tokens + budget
    return (
        MemoryEstimate("base weights", "both", width * base_parameter_count(shape), f"{width} B per parameter"),
        MemoryEstimate("adapter", "both", 4 * copies * trained, f"{copies} fp32 copies: {tensors}"),
        MemoryEstimate("KV cache", "rollout", rows * seen * kv, f"{rows} rows × {seen:,} tokens × {kv:,} B"),
        MemoryEstimate("DeltaNet state", "rollout", rows * state, f"{rows} rows × {state:,} B"),
        MemoryEstimate(
            "sampler", "rollout", rows * shape.vocab_size * (width + 20), f"{rows} rows of logits, sampled in fp64"
        ),
        MemoryEstimate("activations", "update", micro * length * saved, f"{micro} rows × {length:,} tokens, {how}"),
        MemoryEstimate("logits", "update", chunk * shape.vocab_size * (width + 8), f"one chunk of {chunk:,} tokens"),
    )


def _weight_bytes(config: Config) -> int:
    on_cpu = config.model.device == "cpu"
    return {"bfloat16": 2, "float32": 4, "auto": 4 if on_cpu else 2}[config.model.dtype]
