"""The checks of every public function: the error for a user's mistake names the argument, its value and the fix.

``TypeError`` is for an argument of the wrong kind (a list, or an integer tensor instead of a floating-point one),
``ValueError`` for the right kind with a wrong value. Only numbers, and CPU tensors with one number per sample (times,
rewards, scales), have their values checked. To read the values of a tensor on an accelerator, the CPU would have to
wait for it. Tensors of samples are checked by shape and dtype alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dmdr_core.base.devices import on_device
from dmdr_core.base.precision import working_dtype


def samples(**tensors: Tensor) -> None:
    """Require floating-point tensors of one shape ``[B, ...]`` with at least one element."""
    for name, x in tensors.items():
        floating(name, x)
    (first, x), *others = tensors.items()
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{first} has shape {tuple(x.shape)}: give [B, ...] with at least one sample")
    for name, y in others:
        if y.shape != x.shape:
            raise ValueError(
                f"{name} has shape {tuple(y.shape)} and {first} {tuple(x.shape)}: give both the same shape"
            )


def floating(name: str, x: Tensor) -> None:
    """Require a tensor of a real floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: give a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: give real floating-point numbers, for example {name}.float()")


def one_per_sample(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """Return ``value``, a number or a tensor ``[]`` or ``[B]``, on the device of ``x`` and shaped to multiply ``x``."""
    if isinstance(value, Tensor):
        if value.ndim > 1 or (value.ndim == 1 and len(value) != len(x)):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: give a scalar or one per sample, [{len(x)}]")
    elif not is_number(value):
        raise TypeError(f"{name} is a {type(value).__name__}: give a number or a torch.Tensor")
    ones = [1] * (x.ndim - 1)
    if isinstance(value, Tensor):
        return on_device(value, x.device).reshape(-1, *ones)
    dtype = working_dtype(x) if isinstance(value, float) else None
    return torch.full([1, *ones], value, dtype=dtype, device=x.device)


def between(name: str, value: Tensor | float, low: float, high: float) -> None:
    """Require every entry in ``[low, high]``; NaN is outside. Tensors on an accelerator are not read."""
    value = torch.as_tensor(value)
    if value.device.type == "cpu" and not bool(((value >= low) & (value <= high)).all()):
        raise ValueError(f"{name} = {_shown(value)} is outside [{low}, {high}]: give {name} within it")


def all_finite(name: str, value: Tensor | float) -> None:
    """Require that no entry is NaN or infinite. Tensors on an accelerator are not read."""
    value = torch.as_tensor(value)
    if value.device.type == "cpu" and not bool(value.isfinite().all()):
        raise ValueError(f"{name} = {_shown(value)} holds NaN or infinity: drop or repair those samples first")


def count(name: str, value: int, minimum: int, fix: str = "") -> None:
    """Require an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} = {value!r} is a {type(value).__name__}: give an int")
    if value < minimum:
        raise ValueError(f"{name} = {value} is less than {minimum}: {fix or f'give {minimum} or more'}")


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> None:
    """Require a finite number in ``[low, high)``, or in ``(low, high)`` with ``open_low``."""
    if not is_number(value):
        raise TypeError(f"{name} = {value!r} is a {type(value).__name__}: give a number")
    if not math.isfinite(value) or not low <= value < high or (open_low and value == low):
        bracket = "(" if open_low or low == -math.inf else "["
        raise ValueError(f"{name} = {value}: give a finite number in {bracket}{low}, {high})")


def one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Require a known word; the error names the nearest one."""
    words = list(valid)
    if value not in words:
        near = difflib.get_close_matches(str(value).lower(), words, n=1, cutoff=0.0)
        raise ValueError(
            f"{name} = {value!r} is unknown: did you mean {near[0]!r}? Valid: {', '.join(map(repr, words))}"
        )


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a plain int or float; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Tensor, most: int = 8) -> str:
    entries = value.detach().flatten()
    listed = ", ".join(f"{entry:g}" for entry in entries[:most].tolist())
    return f"[{listed}{', ...' if len(entries) > most else ''}]"
