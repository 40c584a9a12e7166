# SPDX-License-Identifier: MIT
"""The image encoder: a timm backbone chosen by name, and the preprocessing in front of it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fpt_model.attention import AttendBy, Attention, scaled_dot_product_attention
from fpt_model.config import FPTConfig
from fpt_model.geometry import ModelView
from fpt_model.layers import (
    AxialRoPE,
    RMSNorm,
    Rotation,
    attend,
    grid_positions,
    merge_heads,
    position_features,
    rotated_cosine,
    split_heads,
)

_torchvision_stub: torch.library.Library | None = None


def import_timm() -> ModuleType:
    """Import timm, also where torchvision's compiled operators do not match torch's build.

    torchvision registers fake kernels for ``nms`` at import and fails if its binary, built for
    another torch, could not define the operator. We never call it, so its schema is enough.
    """
    global _torchvision_stub
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        if "torchvision::nms" not in str(error):
            raise
        import sys

        for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        _torchvision_stub = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            _torchvision_stub.define(
                f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import timm
    return timm


def check_image(image: NDArray[np.uint8]) -> None:
    """ValueError unless ``image`` is a non-empty uint8 ``[H, W, 3]`` array (RGB)."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"image must be a uint8 array [H, W, 3] RGB, received {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape [H, W, 3], received {list(image.shape)}")


def preprocess(image: NDArray[np.uint8], config: FPTConfig) -> Tensor:
    """uint8 RGB ``[H, W, 3]`` to the model's square float32 ``[1, 3, S, S]`` in [-1, 1].

    The region is :class:`~fpt_model.geometry.ModelView`'s; resized bilinearly with antialiasing.
    """
    check_image(image)
    left, top, width, height = ModelView(image.shape[0], image.shape[1], config.fit).box
    region = np.ascontiguousarray(image[top : top + height, left : left + width])
    if not region.flags.writeable:  # torch warns of sharing such memory
        region = region.copy()
    x = torch.from_numpy(region).permute(2, 0, 1)[None].float()
    return resize_square(x, config.image_size) / 127.5 - 1  # the fewer pixels


def resize_square(x: Tensor, side: int) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 3, side, side]``."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


def norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm over the last axis to the channels of ``x [B, C, h, w]``."""
    out: Tensor = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return out


class ContextBlock(nn.Module):
    """A transformer block over a map's cells: self-attention and SwiGLU, pre-norm, residual."""

    fused: Attention = staticmethod(scaled_dot_product_attention)

    def __init__(self, config: FPTConfig) -> None:
        super().__init__()
        w = config.context_width
        self.heads, hidden = w // config.head_dim, w * config.ffn_expand
        self.attention_norm, self.ffn_norm = (RMSNorm(w, eps=1e-6) for _ in range(2))
        self.scale = nn.Parameter(torch.full((self.heads,), 10.0))
        self.qkv = nn.Linear(w, 3 * w, bias=False)
        self.out = nn.Linear(w, w, bias=False)
        self.ffn_up = nn.Linear(w, 2 * hidden, bias=False)
        self.ffn_down = nn.Linear(hidden, w, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.ffn_down.weight)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """``x [B, T, W]`` with the rotary embedding of its cells."""
        qkv = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (split_heads(t, self.heads) for t in qkv)
        q, k = (rotated_cosine(t, self.scale, rotation) for t in (q, k))
        x = x + self.out(merge_heads(attend(q, k, v, fused=self.fused)))
        value, gate = self.ffn_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.ffn_down(value * F.silu(gate))


class ContextEncoder(nn.Module):
    """Lets the cells of convolutional maps see each other: what belongs together is not local."""

    def __init__(self, config: FPTConfig, channels: list[int]) -> None:
        super().__init__()
        w = config.context_width
        if w % config.head_dim:
            raise ValueError(
                f"context_width must be a multiple of head_dim = {config.head_dim}, received {w}"
            )
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.position_bands = config.position_bands
        self.project = nn.Linear(sum(channels) + config.position_dim, w, bias=False)
        self.rope = AxialRoPE(w // config.head_dim, config.head_dim)
        self.blocks = nn.ModuleList(ContextBlock(config) for _ in range(config.context_depth))
        self.norm_out = RMSNorm(w, eps=1e-6)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """``maps`` (``[B, C_i, h_i, w_i]``, finest first) to ``[B, W, h_0, w_0]``."""
        h, w = maps[0].shape[-2:]
        normed = [norm_channels(norm, m) for norm, m in zip(self.norms, maps, strict=True)]
        resized = [F.interpolate(m, (h, w), mode="bilinear") for m in normed[1:]]
        cells = torch.cat([normed[0], *resized], 1).flatten(2).transpose(1, 2)
        pos = grid_positions(h, w, cells.device)[None]
        place = position_features(pos, self.position_bands).to(cells.dtype)
        x = self.project(torch.cat([cells, place.expand(len(cells), -1, -1)], -1))
        rotation = self.rope(pos)
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm_out(x).transpose(1, 2).unflatten(2, (h, w))


class DetailDecoder(nn.Module):
    """Carries what the context knows back up to fine maps, so that edges are as sharp as those.

    The expanding half of a U-Net (Ronneberger et al., MICCAI 2015): at each step up the coarse map
    is enlarged and joined with the image's own features there.
    """

    def __init__(self, context: int, channels: list[int], width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(context, width, 1, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.joins = nn.ModuleList(nn.Conv2d(c + width, width, 3, padding=1) for c in channels)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, context: Tensor, maps: list[Tensor]) -> Tensor:
        """``context [B, C, h, w]`` and ``maps [B, C_i, h_i, w_i]``, coarser ones first, to a map
        ``[B, width, ...]`` of the last one's size."""
        x = self.reduce(context)
        for norm, join, fine in zip(self.norms, self.joins, maps, strict=True):
            x = F.interpolate(x, fine.shape[-2:], mode="bilinear")
            x = F.silu(join(torch.cat([norm_channels(norm, fine), x], 1)))
        return norm_channels(self.norm_out, x + F.silu(self.smooth(x)))


class ImageEncoder(nn.Module):
    """Image in [-1, 1] to feature maps, of which the first is the cross-attention's memory.

    timm's vision transformers give one map (class and register tokens are dropped, after the final
    norm). timm's convolutional ``features_only`` backbones give several: the coarser of their
    ``out_indices`` seen by a :class:`ContextEncoder`, then the finest; with ``detail_width`` the
    finest is left to a :class:`DetailDecoder`, whose map comes last, and the next one is given.
    """

    mean: Tensor
    std: Tensor
    fused: Attention = staticmethod(scaled_dot_product_attention)  # of vision transformers

    def __init__(self, config: FPTConfig) -> None:
        super().__init__()
        kwargs = copy.deepcopy(config.encoder_kwargs)  # timm writes into nested ones
        self.convolutional = bool(kwargs.get("features_only"))
        if not self.convolutional:
            kwargs.update(img_size=config.image_size, num_classes=0, global_pool="")
        self.backbone = import_timm().create_model(config.encoder, pretrained=False, **kwargs)
        self.detail = None
        if self.convolutional:
            channels = list(self.backbone.feature_info.channels())
            self.fine = 2 if config.detail_width else 1  # maps that the context does not see
            if len(channels) <= self.fine:
                raise ValueError(
                    f"a convolutional encoder needs at least {self.fine + 1} out_indices here, "
                    f"received {kwargs.get('out_indices')}"
                )
            skips, others = channels[: self.fine][::-1], channels[self.fine :]
            self.norm = nn.LayerNorm(skips[0])  # a convolutional map's scale is arbitrary
            self.context = ContextEncoder(config, others)
            self.dims = [config.context_width, skips[0]]
            if config.detail_width:
                self.detail = DetailDecoder(config.context_width, skips, config.detail_width)
                self.dims.append(config.detail_width)
        else:
            self.dims = [int(self.backbone.num_features)]
        self.register_buffer(
            "mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[B, 3, S, S]`` in [-1, 1] to maps ``[B, C_i, h_i, w_i]`` with ``C_i`` of ``dims``,
        coarsest first."""
        x = ((image + 1) / 2 - self.mean) / self.std
        x = x.to(next(self.backbone.parameters()).dtype)
        if self.convolutional:
            maps = self.backbone(x.contiguous(memory_format=torch.channels_last))
            skips, others = maps[: self.fine][::-1], maps[self.fine :]
            out = [self.context(others), norm_channels(self.norm, skips[0])]
            return out if self.detail is None else [*out, self.detail(out[0], skips)]
        # gradients are left to torch's attention, and torch.compile without a mode to look into
        with nullcontext() if torch.is_grad_enabled() else AttendBy(self.fused):
            tokens = self.backbone.forward_features(x)  # [B, prefix + h * w, C]
        tokens = tokens[:, self.backbone.num_prefix_tokens :]
        return [tokens.transpose(1, 2).unflatten(2, self.backbone.patch_embed.grid_size)]
