# SPDX-License-Identifier: MIT
"""The Flow Poke Transformer (Baumann et al., "What If: Understanding Motion Through Sparse
Interactions", ICCV 2025): from an image and pokes to the raw parameters of a mixture over motion.

Attention is query-causal: poke i sees pokes 0..i, a query sees a prefix of the pokes and itself,
never another query. So pokes never depend on what comes after them: their keys and values are kept
(:class:`PokeContext`), and more pokes, or any number of queries, are run against them.

Shapes: B images, P pokes, Q queries, N image tokens, W width, H heads, E = W / H, D flow dims.
Positions are in model coordinates: [0, 1]^2 over the model's square input, (x, y), y down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_model.attention import Attention, scaled_dot_product_attention
from fpt_model.config import FPTConfig
from fpt_model.encoder import ImageEncoder
from fpt_model.layers import (
    QKV,
    AxialRoPE,
    RMSNorm,
    Rotation,
    attend,
    grid_positions,
    merge_heads,
    position_features,
    rotated_cosine,
    sample_maps,
    split_heads,
)

KeyValue = tuple[Tensor, Tensor]  # [B, H, T, E] each


@dataclass(frozen=True)
class ImageFeatures:
    """What the transformer needs of an image; made once, shared by every poke and query."""

    maps: list[Tensor]  # [B, C_i, h_i, w_i], sampled at tokens' positions; coarsest first
    memory: list[KeyValue]  # a layer's cross-attention keys (rotated) and values


@dataclass(frozen=True)
class Tokens:
    """Pokes and queries as the layers take them, and where they are."""

    x: Tensor  # [B, T, W]
    rotation: Rotation


@dataclass(frozen=True)
class PokeContext:
    """What later pokes and queries need of the pokes so far.

    Appending makes a new context. One that has room (:meth:`with_room`) is written to in place, so
    of those only the newest may be used.
    """

    # a layer's self-attention keys (rotated) and values, [B, H, P + room, E]
    keys_values: list[KeyValue]
    pokes: int  # P

    def with_room(self, batch: int, room: int) -> PokeContext:
        """A copy of a context of one row for ``batch`` rows and ``room`` further pokes."""

        def copy(x: Tensor) -> Tensor:
            out = x.new_empty(batch, x.shape[1], self.pokes + room, x.shape[3])
            out[:, :, : self.pokes] = x[:, :, : self.pokes]
            return out

        return PokeContext([(copy(k), copy(v)) for k, v in self.keys_values], self.pokes)


def append(past: Tensor | None, pokes: int, new: Tensor) -> Tensor:
    """``new [B, H, P, E]`` behind the first ``pokes`` of ``past``, in place where that has room."""
    if past is None:
        # a view would keep the keys and values of all queries alive, and with whatever strides the
        # new ones have torch.compile takes each for another nature
        return new.clone(memory_format=torch.contiguous_format)
    end = pokes + new.shape[2]
    if past.shape[2] < end:
        return torch.cat([past[:, :, :pokes], new], 2)
    past[:, :, pokes:end] = new
    return past


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale ``1 + A c`` depends on the conditioning ``c [B, W]``."""

    EPS = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def scale(self, cond: Tensor) -> Tensor:
        """``[B, W]``."""
        return 1 + self.linear(cond)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.EPS) * self.scale(cond)[:, None]


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last ``T`` pokes ``q [B, H, T, E]`` attend to all before and to themselves.

    ``k, v [B, H, P, E]`` are those of all pokes, P >= T.
    """
    t, p = q.shape[2], k.shape[2]
    mask = None
    if t > 1:  # a single new poke sees all
        mask = torch.full((t, p), -torch.inf, dtype=q.dtype, device=q.device).triu(p - t + 1)
    return attend(q, k, v, mask)


def attend_pokes_and_self(
    q: Tensor, k: Tensor, v: Tensor, pokes: KeyValue, hidden: Tensor | None
) -> Tensor:
    """Each query attends to the pokes it may see and to itself.

    ``q, k, v [B, H, Q, E]`` are the queries' own, ``pokes`` holds ``[B, H, P, E]``; ``hidden
    [Q, P]`` is True where a query must not see a poke, or None.
    """
    poke_k, poke_v = pokes
    q = q.float()  # logits are large, up to the scale, and rounded ones change the weights
    logits = q @ poke_k.float().transpose(-1, -2)  # [B, H, Q, P]
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    self_logit = (q * k).sum(-1, keepdim=True)  # [B, H, Q, 1]
    weights = torch.cat([logits, self_logit], -1).softmax(-1, torch.float32).to(v.dtype)
    return weights[..., :-1] @ poke_v + weights[..., -1:] * v


class Layer(nn.Module):
    """Self-attention, cross-attention to the image, SwiGLU; pre-norm and residual."""

    fused: Attention = staticmethod(scaled_dot_product_attention)  # of many queries to the image

    def __init__(self, config: FPTConfig, image_dim: int) -> None:
        super().__init__()
        w, hidden = config.width, config.width * config.ffn_expand
        self.heads = config.heads
        self.self_norm, self.cross_norm, self.ffn_norm = (AdaRMSNorm(w) for _ in range(3))
        self.self_scale = nn.Parameter(torch.full((config.heads,), 10.0))
        self.cross_scale = nn.Parameter(torch.full((config.heads,), 10.0))
        self.self_qkv = QKV(w)
        self.self_out = nn.Linear(w, w, bias=False)
        self.cross_q = nn.Linear(w, w, bias=False)
        self.cross_kv = nn.Linear(image_dim, 2 * w, bias=False)
        self.ffn_up = nn.Linear(w, 2 * hidden, bias=False)
        self.ffn_down = nn.Linear(hidden, w, bias=False)
        nn.init.zeros_(self.self_out.weight)
        nn.init.zeros_(self.ffn_down.weight)

    def image_memory(self, tokens: Tensor, rotation: Rotation) -> KeyValue:
        """Cross-attention keys and values of image tokens ``[B, N, C]``."""
        k, v = (split_heads(t, self.heads) for t in self.cross_kv(tokens).chunk(2, -1))
        # contiguous: a view would keep the raw keys alive
        return rotated_cosine(k, self.cross_scale, rotation), v.contiguous()

    def forward(
        self,
        x: Tensor,
        pokes: int,
        rotation: Rotation,
        cond: Tensor,
        memory: KeyValue,
        past: KeyValue | tuple[None, None] = (None, None),
        known: int = 0,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """One pass over ``x [B, T, W]``: first ``pokes`` new pokes, then queries.

        ``past`` are self-attention keys and values of ``known`` earlier pokes, ``hidden [Q, P]`` as
        in :func:`attend_pokes_and_self`. Returns the new ``x``, and ``past`` with the new ones.
        """
        attended, kept = self._self_attend(
            self.self_norm(x, cond), pokes, rotation, past, known, hidden
        )
        x = x + self.self_out(attended)

        cq = split_heads(self.cross_q(self.cross_norm(x, cond)), self.heads)
        cq = rotated_cosine(cq, self.cross_scale, rotation)
        # no output projection here: the public implementation has one but never applies it
        x = x + merge_heads(self._cross_attend(cq, memory))

        value, gate = self.ffn_up(self.ffn_norm(x, cond)).chunk(2, -1)
        return x + self.ffn_down(value * F.silu(gate)), kept

    def _self_attend(
        self,
        x: Tensor,
        pokes: int,
        rotation: Rotation,
        past: KeyValue | tuple[None, None],
        known: int,
        hidden: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """What the normed ``x [B, T, W]`` attends to, before the output projection."""
        if not pokes and not known:  # each query has only itself to attend to
            k, v = past
            if k is None or v is None:
                k = v = x.new_empty(len(x), self.heads, 0, x.shape[-1] // self.heads)
            return self.self_qkv.values(x), (k, v)
        qkv = self.self_qkv(x).chunk(3, -1)
        q, k, v = (split_heads(t, self.heads) for t in qkv)
        q, k = (rotated_cosine(t, self.self_scale, rotation) for t in (q, k))
        kept = append(past[0], known, k[:, :, :pokes]), append(past[1], known, v[:, :, :pokes])
        seen = kept[0][:, :, : known + pokes], kept[1][:, :, : known + pokes]
        attended = []
        if pokes:
            attended.append(attend_causally(q[:, :, :pokes], *seen))
        if x.shape[1] > pokes or not pokes:
            qq, qk, qv = (t[:, :, pokes:] for t in (q, k, v))
            attended.append(attend_pokes_and_self(qq, qk, qv, seen, hidden))
        return merge_heads(torch.cat(attended, 2)), kept

    def _cross_attend(self, q: Tensor, memory: KeyValue) -> Tensor:
        k, v = memory
        if k.shape[0] == q.shape[0]:
            return attend(q, k, v, fused=self.fused)
        # many hypotheses on an image: fold them into the query axis, the memory is not repeated
        images, t = k.shape[0], q.shape[2]
        folded = q.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, F * T, E]
        out = attend(folded, k, v, fused=self.fused).unflatten(2, (-1, t))  # [B, H, F, T, E]
        return out.transpose(1, 2).flatten(0, 1)


class ResidualMLP(nn.Sequential):
    """RMS norm and a two-layer MLP; the caller adds the residual."""

    def __init__(self, width: int) -> None:
        super().__init__(
            RMSNorm(width, eps=torch.finfo(torch.float32).eps),
            nn.Linear(width, width, bias=False),
            nn.SiLU(),
            nn.Linear(width, width, bias=False),
        )


class TokenEmbedding(nn.Module):
    """Poke flow (Fourier) or the learned query token, with the image feature at the position."""

    coeffs: Tensor
    residual_dtype: torch.dtype | None = None  # of the sum over layers; None: the weights'

    def __init__(self, config: FPTConfig, image_dim: int) -> None:
        super().__init__()
        w, d = config.width, config.flow_dim
        self.prescale = config.flow_prescale
        self.align_corners = config.sample_align_corners
        self.query_token = nn.Parameter(torch.empty(d * w))
        nn.init.trunc_normal_(self.query_token, std=0.02)
        coeffs = 2 * math.pi * torch.arange(1, w // 2 + 1)
        self.register_buffer("coeffs", coeffs, persistent=False)
        self.position_bands = config.position_bands
        self.project = nn.Linear(d * w + config.position_dim + image_dim, w, bias=False)
        self.blocks = nn.ModuleList([ResidualMLP(w), ResidualMLP(w)])

    def forward(
        self, poke_pos: Tensor, poke_flow: Tensor, query_pos: Tensor, maps: list[Tensor]
    ) -> Tensor:
        """Pokes ``[B, P, 2]``, ``[B, P, D]`` and queries ``[B, Q, 2]`` to ``[B, P + Q, W]``.

        A third component that is NaN, a poke whose motion in depth nobody knows, is embedded as
        zeros, which no value is: their squared length is W / 2.
        """
        u = (torch.tanh(self.prescale * poke_flow.float()) + 1) / 2
        phase = u[..., None] * self.coeffs  # [B, P, D, W / 2]
        motion = torch.cat([phase.sin(), phase.cos()], -1)  # [B, P, D, W]
        if poke_flow.shape[-1] == 3:
            motion = motion.masked_fill(poke_flow.isnan()[..., None], 0.0)
        motion = motion.flatten(2)  # [B, P, D * W]
        pos = torch.cat([poke_pos, query_pos], 1)
        local = sample_maps(maps, pos, self.align_corners)
        place = position_features(pos, self.position_bands).to(local.dtype)
        # what all queries have in common is multiplied once
        own, shared = self.project.weight.split(
            [motion.shape[-1], place.shape[-1] + local.shape[-1]], 1
        )
        token = F.linear(self.query_token.to(own.dtype), own).expand(*query_pos.shape[:2], -1)
        kind = torch.cat([F.linear(motion.to(local.dtype), own), token], 1)
        x = kind + F.linear(torch.cat([place, local], -1), shared)
        for block in self.blocks:
            x = x + block(x)
        return x.to(self.residual_dtype or x.dtype)


class Head(nn.Sequential):
    """Tokens ``[..., W]`` to raw outputs ``[..., raw_dim]``, of the type of the last layer."""

    def __init__(self, width: int, raw_dim: int) -> None:
        super().__init__(
            RMSNorm(width, eps=1e-6),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, raw_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        for module in hidden:
            x = module(x)
        assert isinstance(last, nn.Linear)
        return last(x.to(last.weight.dtype))


class FlowPokeTransformer(nn.Module):
    """The whole model. See the module's docstring for shapes and coordinates."""

    def __init__(self, config: FPTConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.encoder = ImageEncoder(config)
        self.cond_emb = nn.Embedding(2, w)  # 0: camera moves or unknown, 1: static
        self.embed = TokenEmbedding(config, sum(self.encoder.dims))
        self.rope = AxialRoPE(config.heads, config.head_dim)
        layers = [Layer(config, self.encoder.dims[0]) for _ in range(config.depth)]
        self.layers: list[Layer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.head = Head(w, config.raw_dim)

    @classmethod
    def from_reference(
        cls, state_dict: Mapping[str, Tensor], config: FPTConfig | Mapping[str, Any]
    ) -> FlowPokeTransformer:
        """Build a model from the state dict of the public implementation, in eval mode.

        ``config`` is ours or theirs (:meth:`FPTConfig.from_reference`). Raises ValueError, a
        ``CheckpointError`` for the tensors, that names the first one that does not fit.
        """
        from fpt_model.checkpoint import from_reference  # which imports this module

        own = config if isinstance(config, FPTConfig) else FPTConfig.from_reference(config)
        return from_reference(state_dict, own)

    def encode(self, image: Tensor) -> ImageFeatures:
        """``[B, 3, S, S]`` in [-1, 1] to features and all layers' cross-attention memory."""
        return self.features(self.encoder(image))

    def features(self, maps: list[Tensor]) -> ImageFeatures:
        """What :meth:`encode` makes of the image encoder's ``maps``."""
        h, w = maps[0].shape[-2:]
        rotation = self.rope(grid_positions(h, w, maps[0].device)[None])
        tokens = maps[0].flatten(2).transpose(1, 2)
        return ImageFeatures(maps, [layer.image_memory(tokens, rotation) for layer in self.layers])

    def run(
        self,
        features: ImageFeatures,
        past: PokeContext | None,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor,
        visible: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> tuple[Tensor, PokeContext]:
        """New pokes and queries in one pass through the layers.

        Args:
            past: the pokes before, or None.
            poke_pos, poke_flow: ``[B, P, 2]``, ``[B, P, D]``, new pokes; P may be 0.
            query_pos: ``[B, Q, 2]``; Q may be 0.
            camera_static: bool ``[B]``.
            visible: ``[Q]``, the number of leading pokes each query sees; None: all of them.
            tokens: what :meth:`tokens` made of these pokes and queries; None: it is done here.

        Returns the last layer's output for the new pokes, then the queries, ``[B, P + Q, W]``; and
        the context with the new pokes appended.
        """
        pokes, known = poke_pos.shape[1], past.pokes if past is not None else 0
        hidden = None
        if visible is not None:
            order = torch.arange(known + pokes, device=query_pos.device)
            hidden = order >= visible[:, None]
        cond = self.cond_emb(camera_static.long())
        if tokens is None:
            tokens = self.tokens(features, poke_pos, poke_flow, query_pos)
        before: Sequence[KeyValue | tuple[None, None]] = [(None, None)] * len(self.layers)
        if past is not None and past.keys_values[0][0].shape[2]:  # else nothing, and no room
            before = past.keys_values
        x, kept = self.run_layers(
            tokens.x, pokes, tokens.rotation, cond, features.memory, before, known, hidden
        )
        return x, PokeContext(kept, known + pokes)

    def tokens(
        self, features: ImageFeatures, poke_pos: Tensor, poke_flow: Tensor, query_pos: Tensor
    ) -> Tokens:
        """Of new pokes, then queries, which know nothing of the pokes yet; as in :meth:`run`."""
        rotation = self.rope(torch.cat([poke_pos, query_pos], 1))
        return Tokens(self.embed(poke_pos, poke_flow, query_pos, features.maps), rotation)

    def run_layers(
        self,
        x: Tensor,
        pokes: int,
        rotation: Rotation,
        cond: Tensor,
        memory: Sequence[KeyValue],
        past: Sequence[KeyValue | tuple[None, None]],
        known: int,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """All of them, one after the other; ``memory`` and ``past`` are those of each `Layer`."""
        keys_values = []
        for layer, image, before in zip(self.layers, memory, past, strict=True):
            x, kept = layer(x, pokes, rotation, cond, image, before, known, hidden)
            keys_values.append(kept)
        return x, keys_values

    def forward_raw(
        self,
        features: ImageFeatures,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Raw head outputs of the queries, ``[B, Q, raw_dim]``: the only thing that is exported."""
        x, _ = self.run(features, None, poke_pos, poke_flow, query_pos, camera_static, visible)
        return self.head(x[:, poke_pos.shape[1] :])

    def forward(
        self,
        features: ImageFeatures,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """Training: ``query_pos [B * F, G, n, 2]``, group g seeing the first ``visible[g]`` pokes.

        F consecutive rows belong to one of the B images of ``features``. ``visible [G]`` is 0, 1,
        2, ... in the paper. Returns ``[B * F, G, n, raw_dim]``.
        """
        groups, n = query_pos.shape[1:3]
        raw = self.forward_raw(
            features,
            poke_pos,
            poke_flow,
            query_pos.flatten(1, 2),
            camera_static,
            visible.repeat_interleave(n),
        )
        return raw.unflatten(1, (groups, n))


def mixture_parameters(raw: Tensor, config: FPTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Raw outputs ``[..., raw_dim]`` to ``log_weights [..., K]``, ``means [..., K, D]`` and
    ``scale_tril [..., K, D, D]``, in float64.

    Layout: K logits; K x D means; K x D(D+1)/2 Cholesky entries, row by row. With the head
    "reference", means and off-diagonal entries are used as they are and the diagonal is
    ``squareplus(z) + min_std`` with ``squareplus(z) = (z + sqrt(z^2 + 4)) / 2``. Its tail is so
    flat that a deviation of 1/250 of the image takes z = -250. With "scaled", means are in tenths
    of the image, the diagonal is ``softplus(z) / 10 + min_std``, and the off-diagonal entries of a
    row are relative to its diagonal.
    """
    k, d = config.components, config.flow_dim
    logits, means, entries = raw.double().split([k, k * d, k * d * (d + 1) // 2], dim=-1)
    entries = entries.unflatten(-1, (k, -1))
    rows, cols = torch.tril_indices(d, d).unbind()
    tril = entries.new_zeros(*entries.shape[:-1], d, d)
    tril[..., rows, cols] = entries
    z = torch.diagonal(tril, dim1=-2, dim2=-1)
    lower = torch.tril(tril, -1)
    if config.head == "reference":
        diagonal = (z + (z.square() + 4).sqrt()) / 2 + config.min_std
    else:
        means = means / 10
        diagonal = F.softplus(z) / 10 + config.min_std
        lower = lower * diagonal[..., None]
    tril = lower + torch.diag_embed(diagonal)
    return logits.log_softmax(-1), means.unflatten(-1, (k, d)), tril


def negative_log_likelihood(raw: Tensor, target: Tensor, config: FPTConfig) -> Tensor:
    """NLL ``[...]`` in nats of ``target [..., D]`` under the mixture of ``raw [..., raw_dim]``."""
    log_weights, means, tril = mixture_parameters(raw, config)
    residual = (target.double()[..., None, :] - means)[..., None]
    z = torch.linalg.solve_triangular(tril, residual, upper=False)[..., 0]
    log_det = torch.diagonal(tril, dim1=-2, dim2=-1).log().sum(-1)
    log_norm = 0.5 * config.flow_dim * math.log(2 * math.pi)
    return -torch.logsumexp(log_weights - 0.5 * z.square().sum(-1) - log_det - log_norm, -1)
