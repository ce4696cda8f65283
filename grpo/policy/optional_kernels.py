"""Restrict the kernels of optional packages to devices and versions on which they are correct."""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

MIN_FLA = (0, 6)
"""Minimum version of flash-linear-attention. 0.4.0 is wrong on Hopper GPUs with recent Triton, 0.5.1 raises in the
backward pass (issues 640, 913, 984 and 999 of fla-org/flash-linear-attention)."""
DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")

_fla_in_layers = True


@functools.cache
def has_fla() -> bool:
    """Return whether flash-linear-attention (the extra ``fast``) is installed in a correct version. An older one is
    reported once and ignored."""
    for package in ("fla-core", "flash-linear-attention"):  # the kernels moved from the second to the first
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        if numbers and (int(numbers[1]), int(numbers[2])) >= MIN_FLA:
            return True
        wanted = ".".join(map(str, MIN_FLA))
        print(f"kernels   {package} {installed} is not used: version {wanted} or later is required", file=sys.stderr)
        return False
    return False


def allow_fla_in_layers(allowed: bool) -> bool:
    """Set whether transformers' layers may call flash-linear-attention in this process; return the previous setting.
    Layers look the kernels up in their module, so the setting cannot belong to a model."""
    global _fla_in_layers
    before, _fla_in_layers = _fla_in_layers, allowed
    return before


def guard_optional_kernels(model: nn.Module) -> None:
    """Make the layers of a transformers model use optional kernels for CUDA tensors only, and those of
    flash-linear-attention only if `has_fla` and `allow_fla_in_layers` allow it.

    transformers selects them on import if they are installed, regardless of the device: on a CPU they raise.
    """
    for modeling in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name in (*DELTA_RULES, *CONVOLUTIONS):
            function = vars(modeling).get(name)
            if function is not None and not hasattr(function, "guarded"):
                setattr(modeling, name, _guarded(function, _layers_use_fla if name in DELTA_RULES else lambda: True))


def _layers_use_fla() -> bool:
    return _fla_in_layers and has_fla()


def _guarded(function: Callable[..., Any], is_usable: Callable[[], bool]) -> Callable[..., Any]:
    plain = inspect.unwrap(function)

    @functools.wraps(plain)
    def call(x: Tensor, *arguments: Any, **options: Any) -> Any:
        return (function if x.is_cuda and is_usable() else plain)(x, *arguments, **options)

    vars(call)["guarded"] = True
    return call
