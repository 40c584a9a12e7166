# SPDX-License-Identifier: MIT
"""Inference: an image is encoded once, then asked many times.

Positions are normalised, [0, 1]^2 over the whole source image, (x, y), y down; flow is in the same
unit (fractions of the image's width and height). See :mod:`fpt_model.geometry`.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fpt_model.allocator import blocks_apart
from fpt_model.backends import Choice, Precision, chosen_backend, open_engine
from fpt_model.checkpoint import load_model
from fpt_model.encoder import preprocess
from fpt_model.engine import PRECISIONS, Context, Engine
from fpt_model.geometry import ModelView, grid
from fpt_model.mixture import FlowMixture, Reduce
from fpt_model.model import FlowPokeTransformer, mixture_parameters

Order = Literal["random", "given"]
_FARTHEST = 1e6  # of any position: its rotary angles are computed in float32
_FASTEST = float(np.finfo(np.float32).max)  # of any motion, whose tanh is taken


@dataclass(frozen=True)
class KnownPokes:
    """Pokes that were run already, in model coordinates, and what is kept of them."""

    pos: NDArray[np.float64]  # [P, 2]
    flow: NDArray[np.float64]  # [P, D]
    context: Context

    def begin(self, pos: NDArray[np.float64], flow: NDArray[np.float64]) -> bool:
        """Whether the pokes ``pos [N, 2]``, ``flow [N, D]`` begin with these."""
        n = len(self.pos)
        same = np.array_equal(flow[:n], self.flow, equal_nan=True)  # NaN: unknown motion in depth
        return np.array_equal(pos[:n], self.pos) and same


@dataclass
class Scene:
    """An encoded image; made by :meth:`FlowPredictor.encode`. Owns everything cached about it.

    It is of use to the predictor that made it only.
    """

    view: ModelView
    features: Any  # the engine's
    engine: Engine
    # by camera_static: the pokes asked about last, to which further ones are only appended
    known: dict[bool, KnownPokes] = field(default_factory=dict)
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
        model: not changed; where types and devices agree its weights are shared.
        backend: "torch"; "onnxruntime", which runs exported graphs; "auto": that where ``graphs``
            are given, which on a CPU encodes faster in fp32, PyTorch otherwise.
        device: a torch device, e.g. "cpu" or "cuda"; of "onnxruntime" the GPU's number is taken.
        precision: "fp32"; "bf16" with torch (faster on CPUs with AMX or AVX-512 BF16, half
            the memory); "fp16" and "int8" with ONNX Runtime, when they were exported.
        graphs: of "onnxruntime": the folder that ``fpt export`` wrote, of this model.
        providers: of "onnxruntime": what may run it, of "tensorrt", "cuda" and "cpu", the first
            preferred.
        strict: raise a :class:`BackendError` where otherwise something else
            than asked runs the model: PyTorch when ONNX Runtime or its graphs cannot be had,
            another provider when the first cannot. The logger "fpt_model" warns of it.
        compile: of "torch": fuse operations by torch.compile, and on the CPU run a few tokens
            (one query, a step of joint sampling), and where torch's is slow many queries of a
            small model and attention, by C++ of our own. Needs a C++ compiler (``CXX``, in one
            word for torch, or g++) and for torch Python's headers; what cannot be compiled runs as
            it is, and the logger "fpt_model" warns of it. Building ours takes seconds, the first
            time; shapes of a new nature (the first poke, the first batch) do so in each process.
        in_place: of "torch": convert ``model`` itself, which is of no use to others afterwards,
            and so never hold two of it.

    Attributes:
        backend, precision, device, providers: what really runs the model.

    Raises ValueError for unknown names, and BackendError where the device is not there. Several
    threads may use one predictor; what is cached belongs to the scenes. Make another one after
    further training of ``model``: this one holds folded and packed copies of the old weights.
    """

    def __init__(
        self,
        model: FlowPokeTransformer,
        backend: Choice = "auto",
        device: str = "cpu",
        precision: Precision = "fp32",
        graphs: str | Path | None = None,
        providers: Sequence[str] = ("cpu",),
        strict: bool = False,
        compile: bool = False,
        in_place: bool = False,
    ) -> None:
        active = open_engine(
            model, backend, device, precision, graphs, providers, strict, compile, in_place
        )
        self.engine, self.backend, self.precision = active.engine, active.backend, active.precision
        self.device, self.providers = self.engine.device, self.engine.providers
        self.config, self._compile = model.config, compile

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        backend: Choice = "auto",
        device: str = "cpu",
        precision: Precision = "fp32",
        graphs: str | Path | None = None,
        **options: Any,
    ) -> FlowPredictor:
        """The predictor of a shipped model's name or a file, and of further ``options`` as above.

        Takes the least memory: with PyTorch on the CPU no weight is held twice, or in float32 for
        "bf16"; glibc's settings are changed for it (:func:`~fpt_model.allocator.blocks_apart`).
        Raises what :func:`~fpt_model.checkpoint.load_model` and the constructor raise.
        """
        dtype = torch.float32
        if chosen_backend(backend, graphs) == "torch":
            dtype = PRECISIONS.get(precision, dtype)  # the constructor refuses unknown names
        with blocks_apart():
            weights = load_model(model, dtype)
            return cls(weights, backend, device, precision, graphs, in_place=True, **options)

    def warm_up(self) -> None:
        """Make the first calls, which are slow, and with ``compile`` compile: no, one and several
        pokes, some queries and as many as a dense flow's.

        Not several hypotheses or samples.
        """
        scene = self.encode(np.zeros((self.config.image_size, self.config.image_size, 3), np.uint8))
        kinds = [(0, (8, 8))]
        if self._compile:
            kinds = [(pokes, size) for pokes in range(3) for size in ((8, 8), (32, 32))]
        for pokes, size in kinds:
            poke = np.zeros((pokes, 2))
            self.dense(replace(scene, known={}), poke, poke, size)

    def encode(self, image: NDArray[np.uint8]) -> Scene:
        """Encode a uint8 RGB image ``[H, W, 3]``; ValueError for anything else."""
        x = preprocess(image, self.config).numpy()
        view = ModelView(image.shape[0], image.shape[1], self.config.fit)
        return Scene(view, self.engine.encode(x), self.engine)

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
            poke_flow: ``[P, D]``. The order of pokes matters (slightly). A model with D = 3 takes
                the third component, relative depth, as unknown where it is NaN, and for ``[P, 2]``
                in all pokes: then it is predicted along with the rest.
            query_pos: ``[Q, 2]``.
            camera_static: whether the camera is known to stand still.

        Raises ValueError naming the argument for wrong shapes or values that are not finite.
        """
        pos, flow = self._check_pokes(poke_pos, poke_flow, batched=False)
        return self.predict_batch(scene, pos[None], flow[None], query_pos, camera_static)[0]

    def predict_batch(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        camera_static: bool = True,
    ) -> FlowMixture:
        """B poke hypotheses ``[B, P, 2]``, ``[B, P, D]`` on one scene: batch shape ``[B, Q]``."""
        raw = self.raw(scene, poke_pos, poke_flow, query_pos, camera_static)
        view = scene.view
        return self._mixture(raw).scaled(
            *view.displacement_to_normalised(np.ones(self.config.flow_dim))
        )

    def raw(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        camera_static: bool = True,
    ) -> NDArray[np.float32]:
        """The raw outputs ``[B, Q, raw_dim]`` behind :meth:`predict_batch`, in model units.

        See :func:`~fpt_model.model.mixture_parameters` for what they mean.
        """
        pos, flow = self._check_pokes(poke_pos, poke_flow, batched=True)
        queries = _check_points("query_pos", query_pos, 2, batched=False)
        if not len(pos):
            raise ValueError(f"poke_pos must hold at least one hypothesis, received {pos.shape}")
        self._check_scene(scene)
        view = scene.view
        pos, flow = view.to_model(pos), view.displacement_to_model(flow)
        camera_static, batch = bool(camera_static), len(pos)
        known = scene.known.get(camera_static) if batch == 1 else None
        if known is not None and not known.begin(pos[0], flow[0]):
            known = None
        old = known.context.pokes if known is not None else 0
        raw, context = self.engine.run(
            scene.features,
            known.context if known is not None else None,
            _float32(pos[:, old:]),
            _float32(flow[:, old:]),
            _float32(np.broadcast_to(view.to_model(queries), (batch, *queries.shape))),
            camera_static,
        )
        if batch == 1 and context.pokes > old:
            scene.known[camera_static] = KnownPokes(pos[0], flow[0], context)
        return raw

    def _mixture(self, raw: NDArray[np.float32]) -> FlowMixture:
        """In model units."""
        parameters = mixture_parameters(torch.from_numpy(raw), self.config)
        return FlowMixture(*(t.numpy() for t in parameters))

    def dense(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        size: tuple[int, int] = (64, 64),
        reduce: Reduce | Literal["sample"] = "mean",
        camera_static: bool = True,
        seed: int = 0,
    ) -> NDArray[np.float32]:
        """Flow ``[h, w, D]`` at the cell centres of an ``(h, w)`` grid over the whole image.

        ``reduce`` is the mixture's mean, its median (the least expected error, as fractions of
        the image's width and height; the node takes it in px), the mean of its most probable
        component ("mode"), or an independent draw for each cell with ``seed`` ("sample";
        :meth:`sample_dense` draws coherent ones). ValueError for another.
        """
        choices = (*get_args(Reduce), "sample")
        if reduce not in choices:
            raise ValueError(f"reduce must be one of {choices}, received {reduce!r}")
        mixture = self.predict(scene, poke_pos, poke_flow, grid(size), camera_static)
        if reduce == "sample":
            flow = mixture.sample(1, np.random.default_rng(seed))[0]
        else:
            flow = mixture.reduce(reduce)
        return flow.reshape(*size, -1).astype(np.float32)

    def sample(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        num_samples: int = 4,
        seed: int = 0,
        order: Order = "random",
        camera_static: bool = True,
    ) -> NDArray[np.float64]:
        """Joint draws of all queries' motions ``[S, Q, D]``, each one coherent future.

        A query is drawn given the pokes and the queries drawn before it (autoregression, Baumann et
        al. 2025, section 3). Draw s depends on ``seed`` and s, not on how many there are, but for
        rounding, which in bf16 may rarely make another component of a mixture the one drawn.

        Args:
            query_pos: ``[Q, 2]``; one pass through the model for each.
            order: in which the queries are drawn: "random", another one for each s, as in training,
                or "given".

        Raises ValueError naming the argument for wrong shapes or values.
        """
        drawing = self.sample_stepwise(
            scene, poke_pos, poke_flow, query_pos, num_samples, seed, order, camera_static
        )
        while True:
            try:
                next(drawing)
            except StopIteration as end:
                drawn: NDArray[np.float64] = end.value
                return drawn

    def sample_stepwise(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        num_samples: int = 4,
        seed: int = 0,
        order: Order = "random",
        camera_static: bool = True,
    ) -> Generator[int, None, NDArray[np.float64]]:
        """:meth:`sample` for callers who watch or stop it: yields how many queries are drawn."""
        queries = _check_points("query_pos", query_pos, 2, batched=False)
        if not isinstance(order, str) or order not in get_args(Order):
            raise ValueError(f'order must be "random" or "given", received {order!r}')
        for name, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0)):
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, received {value!r}")
        rngs = [np.random.default_rng([seed, s]) for s in range(num_samples)]
        n = len(queries)
        orders = np.stack([g.permutation(n) if order == "random" else np.arange(n) for g in rngs])
        self._check_scene(scene)
        self._check_pokes(poke_pos, poke_flow, batched=False)  # also if nothing is asked
        steps = self.sampling_steps(scene, poke_pos, poke_flow, queries[orders], camera_static)
        drawn = np.empty((num_samples, n, self.config.flow_dim))
        rows = np.arange(num_samples)
        flow = None
        for i in range(n):
            mixture = steps.send(flow) if flow is not None else next(steps)
            flow = np.stack([mixture[s].sample(1, rng)[0] for s, rng in enumerate(rngs)])
            drawn[rows, orders[:, i]] = flow
            yield i + 1
        return drawn

    def sampling_steps(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        query_pos: ArrayLike,
        camera_static: bool = True,
    ) -> Generator[FlowMixture, NDArray[np.float64], None]:
        """The steps of :meth:`sample`, for callers who draw, watch or stop in between.

        Yields for query 0, 1, ... of ``query_pos [S, Q, 2]`` its mixture, batch shape ``[S]``, and
        is sent the motions ``[S, D]`` that the following ones are to be given; ValueError for what
        is none. PyTorch runs a query and what was drawn last in each step; ONNX Runtime, which
        keeps nothing of pokes, all pokes and all that was drawn.
        """
        self._check_scene(scene)
        camera_static = bool(camera_static)
        pos, flow = self._check_pokes(poke_pos, poke_flow, batched=False)
        queries = _check_points("query_pos", query_pos, 2, batched=True)
        view, (rows, n) = scene.view, queries.shape[:2]
        if not rows:
            raise ValueError(f"query_pos must hold at least one sample, received {queries.shape}")
        scale = view.displacement_to_normalised(np.ones(self.config.flow_dim))
        # all at once, whatever was asked before: draws would feel the rounding of other products
        _, context = self.engine.run(
            scene.features,
            None,
            _float32(view.to_model(pos[None])),
            _float32(view.displacement_to_model(flow[None])),
            np.empty((1, 0, 2), np.float32),
            camera_static,
        )
        context = context.with_room(rows, n)
        points = _float32(view.to_model(queries))
        last_pos = points[:, :0]
        last_flow = np.empty((rows, 0, self.config.flow_dim), np.float32)
        for i in range(n):
            point = points[:, i : i + 1]
            raw, context = self.engine.run(
                scene.features, context, last_pos, last_flow, point, camera_static
            )
            sent = yield self._mixture(raw[:, 0]).scaled(*scale)
            drawn = _check_points("drawn", sent, self.config.flow_dim, False, _FASTEST, optional=2)
            if len(drawn) != rows:
                raise ValueError(f"drawn must hold {rows} motions, received {len(drawn)}")
            last_pos = point
            last_flow = _float32(view.displacement_to_model(drawn)[:, None])

    def sample_dense(
        self,
        scene: Scene,
        poke_pos: ArrayLike,
        poke_flow: ArrayLike,
        size: tuple[int, int] = (64, 64),
        coarse: tuple[int, int] = (8, 8),
        num_samples: int = 4,
        seed: int = 0,
        camera_static: bool = True,
    ) -> NDArray[np.float32]:
        """Coherent dense futures ``[S, h, w, D]``, coarse to fine.

        A ``coarse`` grid is drawn jointly (:meth:`sample`); the ``size`` grid is then the mean
        given the pokes and all of these, in one pass.
        """
        pos, flow = self._check_pokes(poke_pos, poke_flow, batched=False)
        points = grid(coarse)
        drawn = self.sample(
            scene, pos, flow, points, num_samples, seed, camera_static=camera_static
        )
        pokes = [np.concatenate([pos, points])] * num_samples
        flows = [np.concatenate([flow, d]) for d in drawn]
        mixture = self.predict_batch(
            scene, np.stack(pokes), np.stack(flows), grid(size), camera_static
        )
        return mixture.mean().reshape(num_samples, *size, -1).astype(np.float32)

    def unconditional(
        self, scene: Scene, size: tuple[int, int] = (64, 64), camera_static: bool = True
    ) -> FlowMixture:
        """What might happen without any poke, on a dense grid: batch shape ``[h * w]``.

        Kept with the scene, read-only.
        """
        self._check_scene(scene)
        key = ((size[0], size[1]), bool(camera_static))
        if key not in scene.unconditional:
            none = np.empty((0, 2)), np.empty((0, self.config.flow_dim))
            mixture = self.predict(scene, *none, grid(size), camera_static)
            for array in (mixture.log_weights, mixture.means, mixture.scale_tril):
                array.flags.writeable = False  # all callers share them
            scene.unconditional[key] = mixture
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
        """:meth:`influence` for a dense prediction ``[h * w]`` that was already made.

        Raises ValueError if it is of another shape.
        """
        if poked.shape != (size[0] * size[1],):
            raise ValueError(
                f"expected predictions [{size[0] * size[1]}] on a grid of {size}, received "
                f"{list(poked.shape)}"
            )
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

        None takes the model's own threshold, which ``fpt eval --save-threshold`` chooses on
        validation data. fpt-base has none of its own, since the paper does not give it: 1 nat.
        """
        kl = self.influence(scene, poke_pos, poke_flow, size, camera_static)
        return kl > (self.config.kl_threshold if threshold is None else threshold)

    def _check_scene(self, scene: Scene) -> None:
        if scene.engine is not self.engine:
            raise ValueError("the scene was encoded by another predictor, whose features it holds")

    def _check_pokes(
        self, pos: ArrayLike, flow: ArrayLike, batched: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        p = _check_points("poke_pos", pos, 2, batched)
        f = _as_array("poke_flow", flow)
        if self.config.flow_dim == 3 and f.shape[-1:] == (2,):
            f = np.concatenate([f, np.full((*f.shape[:-1], 1), np.nan)], -1)
        f = _check_points("poke_flow", f, self.config.flow_dim, batched, _FASTEST, optional=2)
        if p.shape[:-1] != f.shape[:-1]:
            raise ValueError(
                f"poke_pos and poke_flow must hold the same pokes, received shapes "
                f"{list(p.shape)} and {list(f.shape)}"
            )
        return p, f


def _float32(x: NDArray[np.float64]) -> NDArray[np.float32]:
    # in the model's square a motion of a long image may be larger than float32 holds
    return np.ascontiguousarray(np.clip(x, -_FASTEST, _FASTEST), np.float32)


def _as_array(name: str, value: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, received {value!r}") from error


def _check_points(
    name: str,
    value: ArrayLike,
    dims: int,
    batched: bool,
    most: float = _FARTHEST,
    optional: int | None = None,
) -> NDArray[np.float64]:
    """A float64 ``[(B,) N, dims]`` array, at most ``most``; ValueError names what was received.

    Component ``optional``, if there is one, may be NaN.
    """
    array = _as_array(name, value)
    if array.shape == (0,) and not batched:
        array = array.reshape(0, dims)  # of an empty list
    if array.ndim != 2 + batched or array.shape[-1] != dims:
        expected = f"[B, N, {dims}]" if batched else f"[N, {dims}]"
        raise ValueError(f"{name} must have shape {expected}, received {list(array.shape)}")
    usable = np.abs(array) <= most
    if optional is not None:
        usable[..., optional:] |= np.isnan(array[..., optional:])
    finite = usable.all(-1)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} must be finite, at most {most:g}, received {array[index].tolist()} at "
            f"{list(index)}"
        )
    return array
