# SPDX-License-Identifier: MIT
"""Inference: an image is encoded once, then asked many times.

Positions are normalised, [0, 1]^2 over the whole source image, (x, y), y down; flow is in the same
unit (fractions of the image's width and height). See :mod:`fpt_model.geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fpt_model.encoder import preprocess
from fpt_model.geometry import ModelView, grid
from fpt_model.mixture import FlowMixture
from fpt_model.model import FlowPokeTransformer, ImageFeatures, PokeContext, mixture_parameters

Precision = Literal["fp32", "bf16"]
Reduce = Literal["mean", "mode", "sample"]

_QUERY_CHUNK = 4096  # queries in one pass; bounds memory, does not change results


@dataclass
class Scene:
    """An encoded image; made by :meth:`FlowPredictor.encode`. Owns everything cached about it."""

    view: ModelView
    features: ImageFeatures
    # the unconditional answers on dense grids, by (grid size, camera_static)
    unconditional: dict[tuple[tuple[int, int], bool], FlowMixture] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """Height of the source image in px."""
        return self.view.height

    @property
    def width(self) -> int:
        """Width of the source image in px."""
        return self.view.width


class FlowPredictor:
    """Answers "if these points move like this, how does that point move?" for encoded images.

    Args:
        model: in eval mode afterwards, moved to ``device``.
        backend: "torch".
        device: a torch device, e.g. "cpu" or "cuda".
        precision: "fp32", or "bf16" (autocast; several times faster on CPUs with AMX).
    """

    def __init__(
        self,
        model: FlowPokeTransformer,
        backend: Literal["torch"] = "torch",
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        if backend != "torch":
            raise ValueError(f'backend must be "torch", received {backend!r}')
        if precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", received {precision!r}')
        self.device = torch.device(device)
        self.precision: Precision = precision
        self.model = model.to(self.device).eval()
        self.config = model.config

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.inference_mode()
    def encode(self, image: NDArray[np.uint8]) -> Scene:
        """Encode a uint8 RGB image ``[H, W, 3]``; ValueError for anything else."""
        x = preprocess(image, self.config).to(self.device)
        with self._autocast():
            features = self.model.encode(x)
        return Scene(ModelView(image.shape[0], image.shape[1], self.config.fit), features)

    def predict(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        camera_static: bool = True,
    ) -> FlowMixture:
        """The motion of each query given all pokes, independently: batch shape ``[Q]``.

        Args:
            poke_pos: ``[P, 2]``, P may be 0: then it is what might happen by itself.
            poke_flow: ``[P, D]``. The order of pokes matters (slightly).
            query_pos: ``[Q, 2]``.
            camera_static: whether the camera is known to stand still.

        Raises ValueError naming the argument for wrong shapes or values that are not finite.
        """
        pos, flow = self._check_pokes(poke_pos, poke_flow, batched=False)
        return self.predict_batch(scene, pos[None], flow[None], query_pos, camera_static)[0]

    @torch.inference_mode()
    def predict_batch(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        camera_static: bool = True,
    ) -> FlowMixture:
        """B poke hypotheses ``[B, P, 2]``, ``[B, P, D]`` on one scene: batch shape ``[B, Q]``."""
        pos, flow = self._check_pokes(poke_pos, poke_flow, batched=True)
        queries = _check_points("query_pos", query_pos, 2, batched=False)
        view, batch = scene.view, pos.shape[0]
        static = torch.full((batch,), camera_static, device=self.device)
        with self._autocast():
            context = self.model.encode_pokes(
                scene.features,
                self._tensor(view.to_model(pos)),
                self._tensor(view.displacement_to_model(flow)),
                static,
            )
            raw = self._decode(
                scene.features, context, self._tensor(view.to_model(queries)), static
            )
        log_weights, means, tril = (t.cpu().numpy() for t in mixture_parameters(raw, self.config))
        in_model = FlowMixture(log_weights, means, tril)
        return in_model.scaled(*view.displacement_to_normalised(np.ones(self.config.flow_dim)))

    def _decode(
        self, features: ImageFeatures, context: PokeContext, queries: Tensor, static: Tensor
    ) -> Tensor:
        """``[B, Q, raw_dim]`` in float32, in chunks of queries."""
        batch = static.shape[0]
        step = max(1, _QUERY_CHUNK // batch)
        chunks = [
            self.model.decode_queries(
                features, context, chunk.expand(batch, -1, -1), static
            ).float()
            for chunk in queries[None].split(step, dim=1)
        ]
        return torch.cat(chunks, dim=1)

    def dense(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        size: tuple[int, int] = (64, 64),
        reduce: Reduce = "mean",
        camera_static: bool = True,
        seed: int = 0,
    ) -> NDArray[np.float32]:
        """Flow ``[h, w, D]`` at the cell centres of an ``(h, w)`` grid over the whole image.

        ``reduce`` is the mixture's mean, the mean of its most probable component, or an
        independent draw for each cell with ``seed``.
        """
        mixture = self.predict(scene, poke_pos, poke_flow, grid(size), camera_static)
        if reduce == "mean":
            flow = mixture.mean()
        elif reduce == "mode":
            flow = mixture.mode()
        elif reduce == "sample":
            flow = mixture.sample(1, np.random.default_rng(seed))[0]
        else:
            raise ValueError(f'reduce must be "mean", "mode" or "sample", received {reduce!r}')
        return flow.reshape(*size, -1).astype(np.float32)

    def unconditional(
        self, scene: Scene, size: tuple[int, int] = (64, 64), camera_static: bool = True
    ) -> FlowMixture:
        """What might happen without any poke, on a dense grid: batch shape ``[h * w]``. Cached."""
        key = (size, camera_static)
        if key not in scene.unconditional:
            none = np.empty((0, 2)), np.empty((0, self.config.flow_dim))
            scene.unconditional[key] = self.predict(scene, *none, grid(size), camera_static)
        return scene.unconditional[key]

    def influence(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        size: tuple[int, int] = (64, 64),
        camera_static: bool = True,
    ) -> NDArray[np.float32]:
        """How much the pokes change what is known of each cell's motion: ``[h, w]`` in nats.

        The KL divergence of the prediction with the pokes from that without (the paper's measure
        of which parts move together; matched bound).
        """
        poked = self.predict(scene, poke_pos, poke_flow, grid(size), camera_static)
        return self.influence_of(scene, poked, size, camera_static)

    def influence_of(
        self, scene: Scene, poked: FlowMixture, size: tuple[int, int], camera_static: bool = True
    ) -> NDArray[np.float32]:
        """:meth:`influence` for a dense prediction ``[h * w]`` that was already made."""
        kl = poked.kl(self.unconditional(scene, size, camera_static))
        return kl.reshape(size).astype(np.float32)

    def moving_part(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        size: tuple[int, int] = (64, 64),
        threshold: float | None = None,
        camera_static: bool = True,
    ) -> NDArray[np.bool_]:
        """The cells ``[h, w]`` that move with the pokes: influence above ``threshold`` nats.

        None takes the model's own threshold, which was chosen on its validation data.
        """
        kl = self.influence(scene, poke_pos, poke_flow, size, camera_static)
        return kl > (self.config.kl_threshold if threshold is None else threshold)

    def _check_pokes(
        self, pos: ArrayLike, flow: ArrayLike, batched: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        p = _check_points("poke_pos", pos, 2, batched)
        f = _check_points("poke_flow", flow, self.config.flow_dim, batched)
        if p.shape[:-1] != f.shape[:-1]:
            raise ValueError(
                f"poke_pos and poke_flow must hold the same pokes, received shapes "
                f"{list(p.shape)} and {list(f.shape)}"
            )
        return p, f

    def _tensor(self, x: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(x).to(self.device, torch.float32)


def _check_points(name: str, value: ArrayLike, dims: int, batched: bool) -> NDArray[np.float64]:
    """A finite float64 ``[(B,) N, dims]`` array; ValueError names what was received."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 2 + batched or array.shape[-1] != dims:
        expected = f"[B, N, {dims}]" if batched else f"[N, {dims}]"
        raise ValueError(f"{name} must have shape {expected}, received {list(array.shape)}")
    finite = np.isfinite(array).all(-1)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} must be finite, received {array[index].tolist()} at {list(index)}"
        )
    return array
