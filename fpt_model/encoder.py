# SPDX-License-Identifier: MIT
"""The image encoder: a timm backbone chosen by name, and the preprocessing in front of it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fpt_model.config import FPTConfig
from fpt_model.geometry import ModelView

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
    x = torch.from_numpy(region).permute(2, 0, 1)[None].float() / 127.5 - 1
    return resize_square(x, config.image_size)


def resize_square(x: Tensor, side: int) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 3, side, side]``."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


class ImageEncoder(nn.Module):
    """Image in [-1, 1] to a feature map.

    Works with timm's vision transformers (class and register tokens are dropped, after the final
    norm) and with its convolutional ``features_only`` backbones, whose maps (``out_indices``) are
    brought to the size of the finest and concatenated.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FPTConfig) -> None:
        super().__init__()
        kwargs = dict(config.encoder_kwargs)
        if not kwargs.get("features_only"):
            kwargs.update(img_size=config.image_size, num_classes=0, global_pool="")
        self.backbone = import_timm().create_model(config.encoder, pretrained=False, **kwargs)
        if kwargs.get("features_only"):
            self.dim = sum(self.backbone.feature_info.channels())
            # a vision transformer ends with its norm; a convolutional map's scale is arbitrary
            self.norm = nn.LayerNorm(self.dim)
        else:
            self.dim = int(self.backbone.num_features)
        self.register_buffer(
            "mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, 3, S, S]`` in [-1, 1] to ``[B, C, h, w]``."""
        x = ((image + 1) / 2 - self.mean) / self.std
        if not hasattr(self.backbone, "forward_features"):
            maps = self.backbone(x)
            size = maps[0].shape[-2:]
            x = torch.cat(
                [maps[0], *(F.interpolate(m, size, mode="bilinear") for m in maps[1:])], 1
            )
            return self.norm(x.movedim(1, -1)).movedim(-1, 1)
        tokens = self.backbone.forward_features(x)  # [B, prefix + h * w, C]
        tokens = tokens[:, self.backbone.num_prefix_tokens :]
        h, w = self.backbone.patch_embed.grid_size
        return tokens.transpose(1, 2).unflatten(2, (h, w))
