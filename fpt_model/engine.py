# SPDX-License-Identifier: MIT
"""A model made ready for inference: constants folded, weights in the wanted type."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fpt_model.encoder import ContextBlock
from fpt_model.model import AdaRMSNorm, FlowPokeTransformer, Layer

# what these own themselves stays in float32: batch statistics, attention scales
_EXACT = (nn.BatchNorm2d, Layer, ContextBlock)


class FoldedRMSNorm(nn.Module):
    """An :class:`~fpt_model.model.AdaRMSNorm` whose conditioning has two values: a table."""

    scales: Tensor

    def __init__(self, norm: AdaRMSNorm, conditions: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", norm.scale(conditions))  # [2, W]

    def forward(self, x: Tensor, camera_static: Tensor) -> Tensor:
        """``x [B, T, W]`` and the index ``[B]`` of the condition."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = torch.rsqrt(norm.square() / x.shape[-1] + AdaRMSNorm.EPS)
        scale = self.scales[camera_static][:, None]
        return torch.mul(x * factor, scale, out=torch.empty_like(x))


@torch.no_grad()
def prepare(
    model: FlowPokeTransformer, device: torch.device, dtype: torch.dtype
) -> FlowPokeTransformer:
    """A copy of ``model`` for inference on ``device``; ``model`` itself is not changed.

    The conditioning of all norms is computed once for both values of the static-camera flag, so
    that a prediction does not read those matrices again (a seventh of fpt-base's transformer).
    Weights become ``dtype``; positions, rotary angles and scales stay float32. Tensors that
    need no conversion are shared with ``model``.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    out = copy.deepcopy(model, shared).eval()
    conditions = model.cond_emb.weight
    for module in list(out.modules()):
        for name, child in module.named_children():
            if isinstance(child, AdaRMSNorm):
                setattr(module, name, FoldedRMSNorm(child, conditions))
    out.cond_emb = nn.Identity()  # type: ignore[assignment]
    for module in out.modules():
        # the last layer is small, and its outputs are what rounding would show in
        exact = isinstance(module, _EXACT) or module is out.head[-1]
        own = torch.float32 if exact else dtype
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = parameter.detach().to(device, own)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return out
