# SPDX-License-Identifier: MIT
"""The Flow Poke Transformer (Baumann et al., "What If: Understanding Motion Through Sparse
Interactions", ICCV 2025): from an image and pokes to the raw parameters of a mixture over motion.

Attention is query-causal: poke i sees pokes 0..i, a query sees a prefix of the pokes and itself,
never another query. Pokes therefore never depend on queries, so the model runs as two streams: the
pokes once, giving keys and values for each layer, then any number of queries against them.

Shapes: B images, P pokes, Q queries, N image tokens, W width, H heads, E = W / H, D flow dims.
Positions are in model coordinates: [0, 1]^2 over the model's square input, (x, y), y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_model.config import FPTConfig
from fpt_model.encoder import ImageEncoder

KeyValue = tuple[Tensor, Tensor]  # [B, H, T, E] each


@dataclass(frozen=True)
class ImageFeatures:
    """What the transformer needs of an image; made once, shared by every poke and query."""

    feat: Tensor  # [B, C, h, w]
    memory: list[KeyValue]  # a layer's cross-attention keys (rotated) and values


@dataclass(frozen=True)
class PokeContext:
    """What the queries need of the pokes."""

    keys_values: list[KeyValue]  # a layer's self-attention keys (rotated) and values
    hidden: Tensor  # [B, P, W] after the last layer


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale ``1 + A c`` depends on the conditioning ``c [B, W]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.linear(cond))[:, None]


class RMSNorm(nn.RMSNorm):
    """RMS norm with a learned weight, which follows the input's type under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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

    def forward(self, pos: Tensor) -> Tensor:
        """Positions ``[B, T, 2]`` to angles ``[B, H, T, E / 2]``: y's first, then x's."""
        s = (2 * pos.float() - 1)[:, None, :, :, None]  # [B, 1, T, 2, 1]
        angles = s * self.freqs[:, None, None]  # [B, H, T, 2, slots]
        return torch.cat([angles[..., 1, :], angles[..., 0, :]], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs ``(p, p + E / 2)`` of ``x [B, H, T, E]`` by ``angles [B, H, T, E / 2]``."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def scaled_cosine(x: Tensor, scale: Tensor) -> Tensor:
    """``x [B, H, T, E]`` with length ``sqrt(|scale|)``, so that ``q . k`` is a scaled cosine."""
    x32 = x.float()
    length = scale.abs().add(1e-6).sqrt()[:, None, None]
    return (x32 * (length * torch.rsqrt(x32.square().sum(-1, keepdim=True) + 1e-6))).to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, W]`` to ``[B, H, T, E]``; heads are contiguous blocks of channels."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, T, E]`` to ``[B, T, W]``."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain softmax attention without a temperature (the cosine scale is already in q and k).

    ``mask`` is additive. Written out because its backward is several times faster on the CPU than
    that of the fused kernel; without gradients the fused kernel saves the memory of the weights.
    """
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1).to(v.dtype) @ v


def attend_pokes_and_self(
    q: Tensor, k: Tensor, v: Tensor, pokes: KeyValue, hidden: Tensor | None
) -> Tensor:
    """Each query attends to the pokes it may see and to itself.

    ``q, k, v [B, H, Q, E]`` are the queries' own, ``pokes`` holds ``[B, H, P, E]``; ``hidden
    [Q, P]`` is True where a query must not see a poke, or None.
    """
    poke_k, poke_v = pokes
    logits = q @ poke_k.transpose(-1, -2)  # [B, H, Q, P]
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    self_logit = (q * k).sum(-1, keepdim=True)  # [B, H, Q, 1]
    weights = torch.cat([logits, self_logit], -1).float().softmax(-1).to(v.dtype)
    return weights[..., :-1] @ poke_v + weights[..., -1:] * v


class Layer(nn.Module):
    """Self-attention, cross-attention to the image, SwiGLU; pre-norm and residual."""

    def __init__(self, config: FPTConfig, image_dim: int) -> None:
        super().__init__()
        w, hidden = config.width, config.width * config.ffn_expand
        self.heads = config.heads
        self.self_norm, self.cross_norm, self.ffn_norm = (AdaRMSNorm(w) for _ in range(3))
        self.self_scale = nn.Parameter(torch.full((config.heads,), 10.0))
        self.cross_scale = nn.Parameter(torch.full((config.heads,), 10.0))
        self.self_qkv = nn.Linear(w, 3 * w, bias=False)
        self.self_out = nn.Linear(w, w, bias=False)
        self.cross_q = nn.Linear(w, w, bias=False)
        self.cross_kv = nn.Linear(image_dim, 2 * w, bias=False)
        self.ffn_up = nn.Linear(w, 2 * hidden, bias=False)
        self.ffn_down = nn.Linear(hidden, w, bias=False)
        nn.init.zeros_(self.self_out.weight)
        nn.init.zeros_(self.ffn_down.weight)

    def image_memory(self, tokens: Tensor, angles: Tensor) -> KeyValue:
        """Cross-attention keys and values of image tokens ``[B, N, C]``."""
        k, v = (split_heads(t, self.heads) for t in self.cross_kv(tokens).chunk(2, -1))
        return rotate(scaled_cosine(k, self.cross_scale), angles), v

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        cond: Tensor,
        memory: KeyValue,
        pokes: KeyValue | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """``x [B, T, W]`` are queries if ``pokes`` are given, else the pokes themselves.

        Returns the new ``x`` and its own self-attention keys and values.
        """
        q, k, v = (
            split_heads(t, self.heads) for t in self.self_qkv(self.self_norm(x, cond)).chunk(3, -1)
        )
        q = rotate(scaled_cosine(q, self.self_scale), angles)
        k = rotate(scaled_cosine(k, self.self_scale), angles)
        if pokes is None:
            t = x.shape[1]
            causal = torch.full((t, t), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
            attended = attend(q, k, v, causal)
        else:
            attended = attend_pokes_and_self(q, k, v, pokes, hidden)
        x = x + self.self_out(merge_heads(attended))

        cq = split_heads(self.cross_q(self.cross_norm(x, cond)), self.heads)
        cq = rotate(scaled_cosine(cq, self.cross_scale), angles)
        # no output projection here: the public implementation has one but never applies it
        x = x + merge_heads(self._cross_attend(cq, memory))

        value, gate = self.ffn_up(self.ffn_norm(x, cond)).chunk(2, -1)
        return x + self.ffn_down(value * F.silu(gate)), (k, v)

    @staticmethod
    def _cross_attend(q: Tensor, memory: KeyValue) -> Tensor:
        k, v = memory
        if k.shape[0] == q.shape[0]:
            return attend(q, k, v)
        # many hypotheses on one image: fold them into the query axis, the memory is not repeated
        b, h, t, e = q.shape
        folded = q.transpose(0, 1).reshape(1, h, b * t, e)
        return attend(folded, k, v).reshape(h, b, t, e).transpose(0, 1)


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

    def __init__(self, config: FPTConfig, image_dim: int) -> None:
        super().__init__()
        w, d = config.width, config.flow_dim
        self.prescale = config.flow_prescale
        self.align_corners = config.sample_align_corners
        self.query_token = nn.Parameter(torch.empty(d * w))
        nn.init.trunc_normal_(self.query_token, std=0.02)
        coeffs = 2 * math.pi * torch.arange(1, w // 2 + 1)
        self.register_buffer("coeffs", coeffs, persistent=False)
        self.project = nn.Linear(d * w + image_dim, w, bias=False)
        self.blocks = nn.ModuleList([ResidualMLP(w), ResidualMLP(w)])

    def forward(self, pos: Tensor, flow: Tensor | None, feat: Tensor) -> Tensor:
        """``pos [B, T, 2]``, ``flow [B, T, D]`` or None for queries -> ``[B, T, W]``."""
        if flow is None:
            motion = self.query_token.expand(*pos.shape[:2], -1)
        else:
            u = (torch.tanh(self.prescale * flow.float()) + 1) / 2
            phase = u[..., None] * self.coeffs  # [B, T, D, W / 2]
            motion = torch.cat([phase.sin(), phase.cos()], -1).flatten(2)
        local = self._sample(feat, pos)
        x = self.project(torch.cat([motion.to(local.dtype), local], -1))
        for block in self.blocks:
            x = x + block(x)
        return x

    def _sample(self, feat: Tensor, pos: Tensor) -> Tensor:
        """Bilinear features ``[B, T, C]`` at ``pos [B, T, 2]``; outside, those of the border."""
        b, t = pos.shape[:2]
        points = pos if feat.shape[0] == b else pos.reshape(1, -1, 2)
        sampled = F.grid_sample(
            feat.float(),
            (2 * points.float() - 1)[:, None],
            mode="bilinear",
            padding_mode="border",
            align_corners=self.align_corners,
        )  # [B, C, 1, T]
        return sampled[:, :, 0].transpose(1, 2).reshape(b, t, feat.shape[1]).to(feat.dtype)


class FlowPokeTransformer(nn.Module):
    """The whole model. See the module's docstring for shapes and coordinates."""

    def __init__(self, config: FPTConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.encoder = ImageEncoder(config)
        self.cond_emb = nn.Embedding(2, w)  # 0: camera moves or unknown, 1: static
        self.embed = TokenEmbedding(config, self.encoder.dim)
        self.rope = AxialRoPE(config.heads, config.head_dim)
        layers = [Layer(config, self.encoder.dim) for _ in range(config.depth)]
        self.layers: list[Layer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.head = nn.Sequential(
            RMSNorm(w, eps=1e-6),
            nn.Linear(w, w),
            nn.SiLU(),
            nn.Linear(w, w),
            nn.SiLU(),
            nn.Linear(w, config.raw_dim),
        )

    def encode(self, image: Tensor) -> ImageFeatures:
        """``[B, 3, S, S]`` in [-1, 1] to features and all layers' cross-attention memory."""
        feat = self.encoder(image)
        memory = F.avg_pool2d(feat, self.config.memory_pooling)
        h, w = memory.shape[-2:]
        x, y = torch.meshgrid(
            (torch.arange(w, device=feat.device) + 0.5) / w,
            (torch.arange(h, device=feat.device) + 0.5) / h,
            indexing="xy",
        )
        angles = self.rope(torch.stack([x, y], -1).view(1, -1, 2))
        tokens = memory.flatten(2).transpose(1, 2)
        return ImageFeatures(feat, [layer.image_memory(tokens, angles) for layer in self.layers])

    def encode_pokes(
        self, features: ImageFeatures, pos: Tensor, flow: Tensor, camera_static: Tensor
    ) -> PokeContext:
        """Run pokes ``pos [B, P, 2]``, ``flow [B, P, D]`` through the layers; P may be 0."""
        cond, angles = self.cond_emb(camera_static.long()), self.rope(pos)
        x = self.embed(pos, flow, features.feat)
        keys_values = []
        for layer, memory in zip(self.layers, features.memory, strict=True):
            x, kv = layer(x, angles, cond, memory)
            keys_values.append(kv)
        return PokeContext(keys_values, x)

    def decode_queries(
        self,
        features: ImageFeatures,
        context: PokeContext,
        pos: Tensor,
        camera_static: Tensor,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Raw head outputs ``[B, Q, raw_dim]`` of queries ``pos [B, Q, 2]``.

        ``visible [Q]`` is the number of leading pokes each query sees; None: all of them.
        """
        cond, angles = self.cond_emb(camera_static.long()), self.rope(pos)
        pokes = context.hidden.shape[1]
        hidden = None
        if visible is not None:
            hidden = torch.arange(pokes, device=pos.device) >= visible[:, None]
        x = self.embed(pos, None, features.feat)
        for layer, memory, kv in zip(
            self.layers, features.memory, context.keys_values, strict=True
        ):
            x, _ = layer(x, angles, cond, memory, kv, hidden)
        return self.head(x)

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
        context = self.encode_pokes(features, poke_pos, poke_flow, camera_static)
        return self.decode_queries(features, context, query_pos, camera_static, visible)

    def forward(
        self,
        image: Tensor,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Training: ``query_pos [B, G, n, 2]``, group g seeing the first ``visible[g]`` pokes.

        ``visible [G]`` None is the paper's 0, 1, 2, ... Returns ``[B, G, n, raw_dim]``.
        """
        groups, n = query_pos.shape[1:3]
        if visible is None:
            visible = torch.arange(groups, device=image.device)
        raw = self.forward_raw(
            self.encode(image),
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
