# SPDX-License-Identifier: MIT
"""What a run descends: the likelihood of motions, and which points belong to one rigid body."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_model import FlowPokeTransformer, FPTConfig
from fpt_model.layers import sample_maps
from fpt_model.model import mixture_parameters, negative_log_likelihood
from training.config import RunConfig
from training.data import Example


class Learner(nn.Module):
    """The model with the auxiliary task of a run: which points belong to one rigid body.

    Simulation knows the answer for every pixel, motion shows it for what happens to move. Points
    are embedded linearly from the maps that the model's tokens sample, and two belong together the
    more the smaller the angle between their embeddings.
    """

    def __init__(self, model: FlowPokeTransformer, width: int = 32) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Linear(sum(model.encoder.dims), width, bias=False)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, image: Tensor, batch: Example, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Raw head outputs ``[B * F, G, n, raw_dim]`` and logits ``[B, M, M]`` of pairs of points.

        ``image [B, 3, S, S]`` in [-1, 1].
        """
        features = self.model.encode(image)
        raw = self.model(
            features,
            batch.poke_pos.flatten(0, 1),
            batch.poke_flow.flatten(0, 1),
            batch.query_pos.flatten(0, 1),
            batch.camera_static.flatten(),
            visible,
        )
        points = sample_maps(
            features.maps, batch.segment_pos, self.model.config.sample_align_corners
        )
        e = F.normalize(self.embedding(points).float(), dim=-1)
        logits = self.scale * (e @ e.transpose(-1, -2)) + self.bias
        return raw, logits


class Terms(NamedTuple):
    """A loss over some examples, as a sum. Sums over parts of a batch add up to that of all."""

    sum: Tensor  # [], float64
    count: Tensor  # [], float64: how many terms it is of

    @classmethod
    def of(cls, values: Tensor) -> Terms:
        """Of all values ``[...]``."""
        summed = values.double().sum()
        return cls(summed, summed.new_tensor(values.numel()))


def robust(nll: Tensor, config: RunConfig) -> Tensor:
    """NLL ``[...]`` under the mixture with an outlier component, uniform over ``[-1, 1]^D``."""
    share = config.optim.outlier_share
    if share == 0:
        return nll
    outlier = math.log(share) - config.model.flow_dim * math.log(2)
    return -torch.logaddexp(math.log1p(-share) - nll, torch.full_like(nll, outlier))


def energy_score(raw: Tensor, target: Tensor, config: FPTConfig) -> Tensor:
    """Energy score ``[...]`` of ``target [..., D]``, in its unit; raw outputs ``[..., raw_dim]``.

    E|X - y| - E|X - X'| / 2 with X, X' drawn from the mixture: a proper score, as the likelihood is
    (Gneiting & Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 2007,
    equation 22), but one that counts a miss by its distance. The mean length of a Gaussian vector
    ``N(m, S)`` is taken as ``sqrt(|m|^2 + c tr S)`` with c such that it is exact for m = 0 and S a
    multiple of the identity; for long m it is exact too.
    """
    log_weights, means, tril = mixture_parameters(raw, config)
    d = config.flow_dim
    c = 2 / d * (math.gamma((d + 1) / 2) / math.gamma(d / 2)) ** 2
    spread = c * tril.square().sum((-2, -1))
    weights = log_weights.exp()
    miss = ((means - target.double()[..., None, :]).square().sum(-1) + spread).sqrt()
    apart = (means[..., :, None, :] - means[..., None, :, :]).square().sum(-1)
    between = (apart + spread[..., :, None] + spread[..., None, :]).sqrt()
    pairs = weights[..., :, None] * weights[..., None, :]
    return (weights * miss).sum(-1) - 0.5 * (pairs * between).sum((-2, -1))


def motion_loss(raw: Tensor, batch: Example, config: RunConfig) -> tuple[Terms, Terms]:
    """Robust NLL in nats and energy score in fractions of the side, of the supervised queries.

    ``raw [B, F, G, n, raw_dim]``.
    """
    known = ~batch.query_flow.isnan().any(-1)
    outputs, flow = raw[known], batch.query_flow[known]
    nll = robust(negative_log_likelihood(outputs, flow, config.model), config)
    score = energy_score(outputs, flow, config.model)
    return Terms.of(nll), Terms.of(score)


def segment_loss(logits: Tensor, body: Tensor) -> Terms:
    """Binary cross-entropy of pairs ``[B, M, M]`` with at least one point on a body (not static).

    ``body [B, M]`` is the index of the body under a point, 0 for the static world.
    """
    together = (body[:, :, None] == body[:, None, :]).float()
    counted = ((body > 0)[:, :, None] | (body > 0)[:, None, :]).float()
    loss = F.binary_cross_entropy_with_logits(logits, together, reduction="none")
    # also without any points a function of the logits: each process must use all parameters
    return Terms((loss * counted).sum().double(), counted.sum().double())
