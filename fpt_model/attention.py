# SPDX-License-Identifier: MIT
"""Softmax attention without gradients on the CPU, where torch's fused kernel is not the fastest.

That kernel multiplies float32 by MKL, which may be slow, and without AMX takes as long in bfloat16.
So there is C++ of our own, many_queries.cpp, for compiled engines; else attention in bfloat16 is
written out, in parts that stay in the caches (benchmarks/engine.md).
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fpt_model import native
from fpt_model.processor import multiplies_bfloat16, multiplies_faster

_PART = 2**20  # logits at once
_FEW = 17  # fewer queries are few_tokens.cpp's, or torch's kernel is called faster

_WRITTEN_OUT = multiplies_bfloat16()

# torch.compile need not look into either: how they proceed depends on the shapes.
_library = torch.library.Library("fpt_model", "FRAGMENT")
_library.define("attend_in_parts(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
_library.define("attend_natively(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")


class Attention(Protocol):
    """Softmax attention of ``q [B, H, Q, E]`` to ``k, v [B, H, N, E]``."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """As ``torch.nn.functional.scaled_dot_product_attention``."""


def _empty(q: Tensor, v: Tensor) -> Tensor:
    """For ``[B, H, Q, E]`` in memory as ``[B, Q, H, E]``, so that merging heads copies nothing."""
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)


@torch.library.impl(_library, "attend_in_parts", "CPU")
def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` of ``[B, H, Q, E]`` and ``[B, H, N, E]``.

    Logits and weights are rounded to the type of ``q``; their sums are not.
    """
    out = _empty(q, v)
    if scale != 1:
        q = q * scale
    # else each part's product would copy them
    keys, v = k.contiguous().transpose(-1, -2), v.contiguous()
    rows = max(1, _PART // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for part, into in zip(q.split(rows, 2), out.split(rows, 2), strict=True):
        into.copy_((part @ keys).softmax(-1) @ v)
    return out


@torch.library.impl(_library, "attend_natively", "CPU")
def attend_natively(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by C++, where logits are float32. BuildError where it cannot be built."""
    batch, heads, queries, head_dim = q.shape
    expected = batch, heads, max(1, k.shape[2]), head_dim
    if k.shape != expected or v.shape != expected or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"expected keys and values {list(expected)} in {q.dtype}, received {list(k.shape)} in "
            f"{k.dtype} and {list(v.shape)} in {v.dtype}"
        )
    function = _function(head_dim, q.dtype)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    out = _empty(q, v)
    shape = [batch, heads, queries, k.shape[2], torch.get_num_threads()]
    shape += [stride for t in (q, k, v) for stride in t.stride()[:3]]
    sizes = np.array(shape, np.int64)
    function(sizes.ctypes.data, q.data_ptr(), k.data_ptr(), v.data_ptr(), scale, out.data_ptr())
    return out


def _function(head_dim: int, dtype: torch.dtype) -> Any:
    """many_queries.cpp's, built where it is not; BuildError, ValueError."""
    if head_dim % 32 or dtype not in native.TYPES:
        raise ValueError(
            "expected heads of a multiple of 32 channels in "
            f"{[str(t) for t in native.TYPES]}, received {head_dim} in {dtype}"
        )
    function = native.function("many_queries", "attend", head_dim, dtype)
    function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_float, ctypes.c_void_p]
    return function


for _name in ("attend_in_parts", "attend_natively"):

    @torch.library.register_fake(f"fpt_model::{_name}", lib=_library)
    def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _empty(q, v)


def _is_ours(q: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether neither gradients nor a mask nor a GPU ask for torch's kernel."""
    on_cpu, plain = q.device.type == "cpu", attn_mask is None and q.dim() == 4
    return on_cpu and plain and not torch.is_grad_enabled() and q.shape[2] >= _FEW


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What torch's function of this name computes, without gradients; for bfloat16 in parts where
    that is faster."""
    if _WRITTEN_OUT and q.dtype == torch.bfloat16 and _is_ours(q, attn_mask):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = torch.ops.fpt_model.attend_in_parts(q, k, v, scale)
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)


def native_attention(head_dim: int, dtype: torch.dtype) -> Attention | None:
    """The same by C++ for heads of so many channels and this type; None where it would gain
    nothing. BuildError where it cannot be built, ValueError for what it is not made for."""
    if not multiplies_faster(dtype):
        return None
    _function(head_dim, dtype)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        alike = k.shape == v.shape == (*q.shape[:2], k.shape[2], head_dim)
        if not (alike and q.shape[-1] == head_dim and q.dtype == k.dtype == v.dtype == dtype):
            return scaled_dot_product_attention(q, k, v, attn_mask, scale)
        if not _is_ours(q, attn_mask):
            return scaled_dot_product_attention(q, k, v, attn_mask, scale)
        out: Tensor = torch.ops.fpt_model.attend_natively(
            q, k, v, head_dim**-0.5 if scale is None else scale
        )
        return out

    return attention


class AttendBy(TorchFunctionMode):
    """Within it, other people's modules attend by another function than torch's."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            own = {k: v for k, v in kwargs.items() if k in ("attn_mask", "scale")}
            others = {k: v for k, v in kwargs.items() if k not in own and v}
            if len(args) == 3 and not others:  # no dropout, not causal, as many heads of keys
                # which may call torch's: a mode is not in force within its own handler
                return self._attention(*args, **own)
        return func(*args, **kwargs)
