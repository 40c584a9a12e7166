# SPDX-License-Identifier: MIT
"""Softmax attention on the CPU in bfloat16, where torch's fused kernel gains nothing by it.

Without AMX that kernel takes as long in bfloat16 as in float32. Products of matrices do not, where
the processor multiplies bfloat16: there attention is written out, in parts that stay in the caches
(benchmarks/engine.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PART = 2**20  # logits at once
_FEW = 32  # with fewer queries the fused kernel is called faster than several others

# AMX was not measured
_WRITTEN_OUT = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()

# torch.compile need not look into the parts, whose number depends on the shapes.
_library = torch.library.Library("fpt_model", "FRAGMENT")
_library.define("attend_in_parts(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")


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


@torch.library.register_fake("fpt_model::attend_in_parts", lib=_library)
def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _empty(q, v)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What torch's function of this name computes, without gradients, by what is fastest here."""
    if (
        _WRITTEN_OUT
        and q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and attn_mask is None
        and not torch.is_grad_enabled()
        and q.dim() == 4
        and q.shape[2] >= _FEW
    ):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = torch.ops.fpt_model.attend_in_parts(q, k, v, scale)
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)


class OwnAttention(TorchFunctionMode):
    """Within it, other people's modules attend by :func:`scaled_dot_product_attention`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            own = {k: v for k, v in kwargs.items() if k in ("attn_mask", "scale")}
            others = {k: v for k, v in kwargs.items() if k not in own and v}
            if len(args) == 3 and not others:  # no dropout, not causal, as many heads of keys
                return scaled_dot_product_attention(*args, **own)
        return func(*args, **kwargs)
