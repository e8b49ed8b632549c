"""Every private name of torch that this package uses. Where a version of torch lacks one, something else is done."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch.autograd import forward_ad


def _find(module: str, name: str) -> Any:
    """What has a (dotted) name in a module; None if there is no such thing."""
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


# ---- whether what is called is recorded ----

is_dynamo_compiling: Callable[[], bool] = _find("torch.compiler", "is_dynamo_compiling") or torch.compiler.is_compiling
is_tracing: Callable[[], bool] = _find("torch", "_C._is_tracing") or _find("torch.jit", "is_tracing")
dispatch_modes: Callable[[], int]
"""How many modes, of make_fx or fake tensors say, see every operator. Unknown: one may, so calls are slow operators."""

# ---- transforms ----

transforms_active: Callable[[], bool]
"""Whether a transform of torch.func is at work. Unknown: none, so a graph around one is not refused."""

in_dual_level: Callable[[], bool]
"""Whether tensors may have tangents. Unknown: they may, so torch's own slow ways are taken."""

nested_forward_mode: Callable[[], bool]
"""Whether forward mode is within forward mode. Unknown: assumed wherever forward mode is, which is then refused."""

_transforms_active = _find("torch", "_C._are_functorch_transforms_active")
if _transforms_active:
    transforms_active = _transforms_active
else:

    def transforms_active() -> bool:
        return False


if hasattr(forward_ad, "_current_level"):

    def in_dual_level() -> bool:
        return forward_ad._current_level >= 0

else:

    def in_dual_level() -> bool:
        return True


_interpreters = _find("torch._functorch.pyfunctorch", "retrieve_all_functorch_interpreters")
_jvp = _find("torch", "_C._functorch.TransformType.Jvp")
if _interpreters and _jvp:

    def nested_forward_mode() -> bool:
        return [level.key() for level in _interpreters()].count(_jvp) > 1

else:
    nested_forward_mode = in_dual_level

_dispatch_modes = _find("torch", "_C._len_torch_dispatch_stack")
if _dispatch_modes:
    dispatch_modes = _dispatch_modes
else:

    def dispatch_modes() -> int:
        return not (transforms_active() or in_dual_level())  # which operators have no rules for


# ---- a GPU's stream ----

current_stream: Callable[[torch.device], int]
"""The address of torch's current stream on a GPU. Unknown: by a public function, which takes 3 us more."""

_current_stream = _find("torch", "_C._cuda_getCurrentRawStream")
if _current_stream:

    def current_stream(device: torch.device) -> int:
        return _current_stream(device.index)

else:

    def current_stream(device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream


# ---- calls of autograd Functions ----

unwrap_if_dead = _find("torch", "_C._functorch.unwrap_if_dead")


def bare_apply(function: Any, *args: Any) -> Any:
    """What `torch.autograd.Function.apply` calls in the end."""
    return super(torch.autograd.Function, function).apply(*args)


has_shortcut = bool(unwrap_if_dead and _transforms_active and _find("torch.autograd", "Function.__base__.apply"))
"""Whether all is there that a faster `apply` takes."""

# ---- batches of torch.autograd, which are older than those of torch.func ----


def _key(name: str) -> Any:
    parse = _find("torch", "_C._parse_dispatch_key")
    try:
        return parse and parse(name)
    except RuntimeError:  # there is no such key
        return None


_included = _find("torch", "_C._dispatch_tls_is_dispatch_key_included")
_keys_of = _find("torch", "_C._dispatch_keys")
_vmap_mode, _batched = _key("VmapMode"), _key("Batched")
remove_batch_dim = _find("torch", "_remove_batch_dim")
add_batch_dim = _find("torch", "_add_batch_dim")
_vmap_info = _find("torch._functorch.autograd_function", "VmapInfo")
_knows_batches = all((_included, _keys_of, _vmap_mode, _batched, remove_batch_dim, add_batch_dim, _vmap_info))


def in_old_vmap() -> bool:
    """Whether a tensor may be one of its batches. Unknown: no, so these raise an error for having no memory."""
    return _knows_batches and _included(_vmap_mode)


def is_batched(tensor: torch.Tensor) -> bool:
    return _keys_of(tensor).has(_batched)


def apply_vmap(function: Any, size: int, dims: Sequence[int | None], args: Sequence[Any]) -> tuple[torch.Tensor, int]:
    """The vmap rule of an autograd Function."""
    return function.vmap(_vmap_info(size, "error"), tuple(dims), *args)
