# SPDX-License-Identifier: MIT
"""From a model of motion in the image to one with relative depth as third component."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fpt_model.config import FPTConfig
from fpt_model.model import FlowPokeTransformer

DEPTH_STD = 0.1
"""Standard deviation of relative depth that a lifted model predicts everywhere: it knows nothing.

Large motions of things in view are of this size.
"""


def lifted_state(model: FlowPokeTransformer) -> dict[str, Tensor]:
    """The state dict of ``model`` (flow_dim 2) for the same configuration with flow_dim 3.

    The planar marginal stays as it was, and relative depth is independent of it, 0 in the mean with
    DEPTH_STD, whatever the image and the pokes: what pokes do in depth is not looked at. All of the
    weights that were added receive gradients, so training goes on from here.

    Raises ValueError unless flow_dim is 2.
    """
    before = model.config
    if before.flow_dim != 2:
        raise ValueError(f"expected a model with flow_dim 2, received {before.flow_dim}")
    state = dict(model.state_dict())
    width = before.width
    # tokens: Fourier features of x, y, then those of z; the learned query token in their place
    token, project = state["embed.query_token"], state["embed.project.weight"]
    state["embed.query_token"] = torch.cat([token, token.new_zeros(width)])
    planar, rest = project[:, : 2 * width], project[:, 2 * width :]
    state["embed.project.weight"] = torch.cat([planar, project.new_zeros(width, width), rest], 1)
    last = f"head.{len(model.head) - 1}"
    for name, neutral in (("weight", 0.0), ("bias", _raw_diagonal(DEPTH_STD, before))):
        key = f"{last}.{name}"
        state[key] = _lifted_rows(state[key], before, neutral)
    return state


def _lifted_rows(rows: Tensor, config: FPTConfig, diagonal: float) -> Tensor:
    """Rows of the head's last layer, see :func:`fpt_model.model.mixture_parameters`.

    Those that are added are 0, but the factor's last diagonal entry, which is ``diagonal``.
    """
    k = config.components
    logits, means, entries = rows.split([k, k * 2, k * 3])
    means, entries = means.unflatten(0, (k, 2)), entries.unflatten(0, (k, 3))
    zero = torch.zeros_like(means[:, :1])
    # L00, L10, L11, then the third row: L20, L21, L22
    entries = torch.cat([entries, zero, zero, torch.full_like(zero, diagonal)], 1)
    means = torch.cat([means, zero], 1)
    return torch.cat([logits, means.flatten(0, 1), entries.flatten(0, 1)])


def _raw_diagonal(std: float, config: FPTConfig) -> float:
    """The raw output that becomes ``std`` on the factor's diagonal."""
    s = std - config.min_std
    if config.head == "reference":
        return s - 1 / s  # of squareplus
    return math.log(math.expm1(10 * s))  # of softplus


def lift(model: FlowPokeTransformer, name: str) -> FlowPokeTransformer:
    """A model with flow_dim 3 of that state, in eval mode; see :func:`lifted_state`."""
    lifted = FlowPokeTransformer(replace(model.config, name=name, flow_dim=3))
    lifted.load_state_dict(lifted_state(model))
    return lifted.eval()
