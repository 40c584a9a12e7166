# SPDX-License-Identifier: MIT
"""Building blocks shared by the image encoder and the poke transformer.

Shapes: B batch, T tokens, W width, H heads, E = W / H. Positions are (x, y) in [0, 1]^2, y down.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_model.attention import Attention, scaled_dot_product_attention

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [B, H, T, E / 2] each


class RMSNorm(nn.RMSNorm):
    """RMS norm with a learned weight; the output has the narrower type of input and weight.

    So it follows the input under autocast, and the weight where a residual stream is wider.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return out.to(self.weight.dtype) if x.dtype.itemsize > self.weight.dtype.itemsize else out


class QKV(nn.Linear):
    """Queries, keys and values of attention by one product, ``[..., W]`` to ``[..., 3 W]``."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)

    def values(self, x: Tensor) -> Tensor:
        """The values alone."""
        return F.linear(x, self.weight.chunk(3)[2])


class AxialRoPE(nn.Module):
    """2-D axial rotary embedding; frequencies pi..10 pi spread over all heads of a layer."""

    freqs: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        slots = head_dim // 4
        n = heads * slots
        freqs = math.pi * 10 ** (torch.arange(n, dtype=torch.float64) / n)
        # head h, slot j uses frequency j * heads + h
        self.register_buffer(
            "freqs", freqs.view(slots, heads).T.float().contiguous(), persistent=False
        )

    def forward(self, pos: Tensor) -> Rotation:
        """Cosines and sines at positions ``[B, T, 2]``: y's angles first, then x's."""
        s = (2 * pos.float() - 1)[:, None, :, :, None]  # [B, 1, T, 2, 1]
        angles = s * self.freqs[:, None, None]  # [B, H, T, 2, slots]
        angles = torch.cat([angles[..., 1, :], angles[..., 0, :]], dim=-1)
        return angles.cos(), angles.sin()


def position_features(pos: Tensor, bands: int) -> Tensor:
    """``[..., 2 + 4 * bands]`` of positions ``[..., 2]``; ``[..., 0]`` without bands.

    With s = 2 pos - 1: s itself, then sines, then cosines of ``pi 2^k s``, k < bands, x before y
    in each (the Fourier features of Mildenhall et al., "NeRF", ECCV 2020, equation 4).
    """
    if not bands:
        return pos[..., :0]
    s = 2 * pos.float() - 1
    rates = math.pi * 2.0 ** torch.arange(bands, device=pos.device)
    angles = (s[..., None] * rates).flatten(-2)  # [..., 2 * bands]
    return torch.cat([s, angles.sin(), angles.cos()], -1)


def rotated_cosine(x: Tensor, scale: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys ``x [B, H, T, E]`` with length ``sqrt(|scale|)``, and rotated.

    So ``q . k`` is a cosine times ``|scale [H]|``; the rotation turns the pairs ``(p, p + E / 2)``.
    Computed in float32 and in few passes over memory, which is what limits it.
    """
    cos, sin = rotation
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    length = scale.float().abs().add(1e-6).sqrt()[:, None, None]
    factor = length * torch.rsqrt(norm.square() + 1e-6)
    a, b = x.chunk(2, dim=-1)
    first = torch.addcmul(a * cos, b, sin, value=-1)
    second = torch.addcmul(b * cos, a, sin)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (torch.cat([first, second], -1) * factor).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part, into in zip((first, second), out.chunk(2, dim=-1), strict=True):
        torch.mul(part, factor, out=into)
    return out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, W]`` to ``[B, H, T, E]``; heads are contiguous blocks of channels."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, T, E]`` to ``[B, T, W]``."""
    return x.transpose(1, 2).flatten(2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    fused: Attention = scaled_dot_product_attention,
) -> Tensor:
    """Plain softmax attention without a temperature (the cosine scale is already in q and k).

    ``mask`` is additive; ``fused`` computes it on a GPU, where that saves the memory of the
    weights, and without gradients. With them it is written out, because its backward is several
    times faster on the CPU than that of torch's fused kernel.
    """
    if q.is_cuda or not torch.is_grad_enabled():
        return fused(q, k, v, mask, scale=1.0)
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1).to(v.dtype) @ v


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of the cells of a grid, row by row: ``[height * width, 2]``."""
    y, x = torch.meshgrid(
        (torch.arange(height, device=device) + 0.5) / height,
        (torch.arange(width, device=device) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack([x, y], -1).view(-1, 2)


def sample_maps(maps: list[Tensor], pos: Tensor, align_corners: bool) -> Tensor:
    """Features of ``maps`` (each ``[B, C_i, h_i, w_i]``) at ``pos [B * F, T, 2]``, concatenated.

    Bilinear, outside the border's; F consecutive rows of ``pos`` belong to one image. Returns
    ``[B * F, T, sum of C_i]``.
    """
    points = (2 * pos.float() - 1).reshape(maps[0].shape[0], 1, -1, 2)
    sampled = [
        F.grid_sample(
            x.float(), points, mode="bilinear", padding_mode="border", align_corners=align_corners
        )[:, :, 0].to(x.dtype)  # [B, C_i, F * T]
        for x in maps
    ]
    return (
        torch.cat(sampled, 1).transpose(1, 2).reshape(*pos.shape[:2], sum(x.shape[1] for x in maps))
    )
