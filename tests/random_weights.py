# SPDX-License-Identifier: MIT
"""Models whose weights are random, all of them."""

import torch

from fpt_model import FlowPokeTransformer


def randomised(model: FlowPokeTransformer, seed: int = 0) -> FlowPokeTransformer:
    """Every weight random: at initialisation the residual branches are zero and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5)
    return model.eval()
