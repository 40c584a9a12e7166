# SPDX-License-Identifier: MIT
"""What runs a model for :class:`~fpt_model.predictor.FlowPredictor`: the interface, and PyTorch.

Engines speak numpy and model coordinates. What they keep of an image or of pokes is theirs alone:
callers hold it and hand it back.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fpt_model.attention import native_attention
from fpt_model.encoder import ContextBlock, ImageEncoder
from fpt_model.model import (
    AdaRMSNorm,
    FlowPokeTransformer,
    ImageFeatures,
    Layer,
    PokeContext,
    Tokens,
)
from fpt_model.native import BuildError, compiler, first_error
from fpt_model.native_layers import FewTokens, QueryLayers
from fpt_model.packed import can_pack, multiply_by_onednn, pack
from fpt_model.processor import mkl_is_slow, multiplies_faster

_log = logging.getLogger("fpt_model")

Array = NDArray[np.float32]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Queries in one pass times the model's width; bounds memory, does not change results. fpt-base runs
# 1,024 at once, fpt-tiny all 4,096 of a dense flow (benchmarks/engine.md).
_PASS = 1024 * 768
# So many queries in one pass, a dense flow's, are likely to be asked again with other pokes. What
# is kept of them is at most as large as an activation.
_KEPT = 1024


class BackendError(RuntimeError):
    """A backend that cannot be had as asked; the message says why, and what to do."""


class Context(Protocol):
    """What an engine keeps of the pokes so far; appending makes a new one."""

    @property
    def pokes(self) -> int:
        """How many."""

    def with_room(self, batch: int, room: int) -> Any:
        """A copy of a context of one row for ``batch`` rows and ``room`` further pokes."""


class Engine(Protocol):
    """Runs a model's two halves. Several threads may use one engine."""

    @property
    def device(self) -> str:
        """Where it runs, as torch names it: "cpu", "cuda:0"."""

    @property
    def providers(self) -> tuple[str, ...]:
        """What in the backend runs it, the first preferred; () where there is no choice."""

    def encode(self, image: Array) -> Any:
        """``[1, 3, S, S]`` in [-1, 1] to the image's features."""

    def run(
        self,
        features: Any,
        past: Any | None,
        poke_pos: Array,
        poke_flow: Array,
        query_pos: Array,
        camera_static: bool,
    ) -> tuple[Array, Context]:
        """Queries, each given all pokes: raw outputs ``[B, Q, raw_dim]`` and the pokes' context.

        Args:
            features: of one image.
            past: the pokes before, or None.
            poke_pos, poke_flow: ``[B, P, 2]``, ``[B, P, D]``, the new pokes; P may be 0.
            query_pos: ``[B, Q, 2]``; Q may be 0.
        """


def parse_device(name: str) -> torch.device:
    """The device that torch calls so, there or not; ValueError for no name."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, received {name!r}: {error}") from error


def open_device(name: str) -> torch.device:
    """The device that torch calls so; BackendError if it is not there, ValueError for no name."""
    device = parse_device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendError(f"the device {name!r} cannot be used: {error}") from error
    return device


@dataclass
class EncodedImage:
    """What :class:`TorchEngine` keeps of one."""

    image: ImageFeatures
    last: tuple[Tensor, Tokens] | None = None  # many queries asked last, [1, Q, 2]

    def tokens(self, model: FlowPokeTransformer, queries: Tensor) -> Tokens:
        """Of ``queries [1, Q, 2]``, kept until others are asked."""
        last = self.last  # another thread may replace it
        if last is None or not torch.equal(last[0], queries):
            none = queries[:, :0], queries.new_empty(1, 0, model.config.flow_dim)
            last = self.last = queries.clone(), model.tokens(self.image, *none, queries)
        return last[1]


class TorchEngine:
    """PyTorch. Pokes are run once: a context holds their keys and values."""

    providers: tuple[str, ...] = ()

    def __init__(
        self,
        model: FlowPokeTransformer,
        device: str,
        precision: str,
        compile: bool = False,
        in_place: bool = False,
    ) -> None:
        self._device = open_device(device)
        self.device, self._dtype = str(self._device), PRECISIONS[precision]
        self.model = prepare(model, self._device, self._dtype, in_place)
        if self.model.encoder.convolutional:
            size, rng = 2 * [model.config.image_size], torch.Generator().manual_seed(0)
            self.model.encoder.backbone = fold_batch_norms(
                self.model.encoder.backbone, torch.rand(1, 3, *size, generator=rng).to(self._device)
            )
        on_cpu = self._device.type == "cpu"
        compile = compile and (not on_cpu or _can_compile())
        few = try_few_tokens(self.model) if compile and on_cpu else None
        if precision == "bf16" and on_cpu and can_pack():
            pack(self.model, () if few is None else few.weights)
        if on_cpu and mkl_is_slow():
            multiply_by_onednn(self.model)
        if few is not None:
            self.model.run_layers = few  # type: ignore[method-assign]
            use_query_layers(self.model, self._dtype)
            use_native_attention(self.model, self._dtype)
        if compile:
            compile_layers(self.model)

    @torch.inference_mode()
    def encode(self, image: Array) -> EncodedImage:
        """:meth:`Engine.encode`."""
        with _exact_convolutions(self._device, self._dtype):
            maps = self.model.encoder(self._tensor(image))
        return EncodedImage(self.model.features([m.to(self._dtype) for m in maps]))

    @torch.inference_mode()
    def run(
        self,
        features: EncodedImage,
        past: PokeContext | None,
        poke_pos: Array,
        poke_flow: Array,
        query_pos: Array,
        camera_static: bool,
    ) -> tuple[Array, PokeContext]:
        """:meth:`Engine.run`.

        The new pokes and the first chunk of queries share a pass: few queries read the weights only
        once. If all of many fit into one, they have it alone, so that their tokens can be kept for
        other pokes.
        """
        image, batch = features.image, len(query_pos)
        pos, flow, points = (self._tensor(x) for x in (poke_pos, poke_flow, query_pos))
        static = torch.full((batch,), int(camera_static), device=self._device)
        chunks, tokens = [], None
        queries = max(1, _PASS // (self.model.config.width * batch))
        if batch == 1 and _KEPT <= points.shape[1] <= queries:
            if pos.shape[1]:
                _, past = self.model.run(image, past, pos, flow, points[:, :0], static)
                pos, flow = pos[:, :0], flow[:, :0]
            tokens = features.tokens(self.model, points)
        for chunk in points.split(queries, dim=1):
            x, past = self.model.run(image, past, pos, flow, chunk, static, tokens=tokens)
            chunks.append(self.model.head(x[:, pos.shape[1] :]).float())
            pos, flow = pos[:, :0], flow[:, :0]
        assert past is not None  # there is at least one chunk, be it empty
        return torch.cat(chunks, dim=1).cpu().numpy(), past

    def _tensor(self, x: Array) -> Tensor:
        return torch.from_numpy(x).to(self._device)


_cudnn_lock = Lock()  # its settings are the process's


@contextmanager
def _exact_convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """In float32 on GPUs: unless told, cuDNN rounds to TF32's 10 bits."""
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with _cudnn_lock:
        before, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


# what these own themselves stays in float32: batch statistics, attention scales
_EXACT = (nn.BatchNorm2d, Layer, ContextBlock)


class FoldedRMSNorm(nn.Module):
    """An :class:`~fpt_model.model.AdaRMSNorm` whose conditioning has two values: a table.

    Its output, for matrices of ``dtype``, has their type.
    """

    scales: Tensor

    def __init__(self, norm: AdaRMSNorm, conditions: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("scales", norm.scale(conditions))  # [2, W]

    def forward(self, x: Tensor, camera_static: Tensor) -> Tensor:
        """``x [B, T, W]`` and the index ``[B]`` of the condition."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = torch.rsqrt(norm.square() / x.shape[-1] + AdaRMSNorm.EPS)
        scale = self.scales[camera_static][:, None]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (x * factor * scale).to(self.dtype)
        return torch.mul(x * factor, scale, out=torch.empty_like(x, dtype=self.dtype))


@torch.no_grad()
def prepare(
    model: FlowPokeTransformer, device: torch.device, dtype: torch.dtype, in_place: bool = False
) -> FlowPokeTransformer:
    """A copy of ``model`` for inference on ``device``; ``model`` is changed only if ``in_place``.

    The conditioning of all norms is computed once for both values of the static-camera flag, so
    that a prediction does not read those matrices again (a seventh of fpt-base's transformer).
    Weights become ``dtype``; positions, rotary angles and scales stay float32, and for bfloat16
    convolutional encoders but for the context's blocks, the sum over layers and the head. Tensors
    that need no conversion are shared with ``model``. Raises ValueError for a model already
    prepared.
    """
    refuse_prepared(model)
    out = (model if in_place else _sharing_copy(model)).eval()
    conditions = out.cond_emb.weight
    for module in list(out.modules()):
        for name, child in module.named_children():
            if isinstance(child, AdaRMSNorm):
                setattr(module, name, FoldedRMSNorm(child, conditions, dtype))
    out.cond_emb = nn.Identity()  # type: ignore[assignment]
    for module, name, parameter, own in _typed_parameters(out, dtype):
        value = parameter.detach().to(device, own)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    for module in out.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if dtype == torch.bfloat16:
        out.embed.residual_dtype = torch.float32
    return out


@torch.no_grad()
def fold_batch_norms(backbone: nn.Module, example: Tensor) -> nn.Module:
    """``backbone``, of several outputs, with batch norms left to the convolutions before them.

    Which comes before which is not said by modules, only by what is run: it is taken from the order
    in which they were made, and what then makes something else of ``example`` is not done.
    """
    folded = _sharing_copy(backbone)
    for module in folded.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                # timm's have the activation within
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    for a, b in zip(backbone(example), folded(example), strict=True):
        if not torch.allclose(a, b, rtol=0, atol=1e-4 * float(a.abs().max())):
            return backbone
    return folded


_Module = TypeVar("_Module", bound=nn.Module)


def _sharing_copy(model: _Module) -> _Module:
    """Of the modules; all tensors are the same."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def refuse_prepared(model: FlowPokeTransformer) -> None:
    """Raises ValueError for a model whose weights :func:`prepare` has folded away."""
    if isinstance(model.cond_emb, nn.Identity):
        raise ValueError(
            "expected a model as it was loaded or trained, received one that an engine converted "
            "in place"
        )


def weight_types(model: FlowPokeTransformer, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """By parameter, the type in which :func:`prepare` makes use of it for ``dtype``."""
    types = {id(parameter): own for _, _, parameter, own in _typed_parameters(model, dtype)}
    return {name: types[id(parameter)] for name, parameter in model.named_parameters()}


def _typed_parameters(
    model: FlowPokeTransformer, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, str, nn.Parameter, torch.dtype]]:
    """Each parameter with its module, its name there, and its type in a prepared model."""
    # the last layer is small, and its outputs are what rounding would show in
    exact = {model.head[-1], model.cond_emb}
    exact |= {m.linear for m in model.modules() if isinstance(m, AdaRMSNorm)}  # these are folded
    if dtype == torch.bfloat16:
        # its 8 bits are too few for a head, and most of its error in fpt-tiny would come from
        # EfficientNet; vision transformers bear it
        exact |= set(model.head.modules())
        if model.encoder.convolutional:
            exact |= set(model.encoder.modules())
            exact -= {m for block in model.encoder.context.blocks for m in block.modules()}
    for module in model.modules():
        own = torch.float32 if isinstance(module, _EXACT) or module in exact else dtype
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, parameter, own


def try_few_tokens(model: FlowPokeTransformer) -> FewTokens | None:
    """What runs a prepared model's layers for a few tokens; None, with a warning, if it cannot."""
    try:
        return FewTokens(model)
    except (BuildError, ValueError) as error:
        _log.warning("few tokens are run by torch.compile's code, not by our own: %s", error)
        return None


def use_query_layers(model: FlowPokeTransformer, dtype: torch.dtype) -> None:
    """Let a prepared model run many queries by C++ of our own where that is faster."""
    if not (QueryLayers.suits(model) and multiplies_faster(dtype)):
        return
    try:
        model.run_layers = QueryLayers(model)  # type: ignore[method-assign]
    except (BuildError, ValueError) as error:
        _log.warning("many queries are run by torch.compile's code, not by our own: %s", error)


def use_native_attention(model: FlowPokeTransformer, dtype: torch.dtype) -> None:
    """Let a prepared model's layers attend by C++ of our own where that is faster."""
    try:
        attention = native_attention(model.config.head_dim, dtype)
    except (BuildError, ValueError) as error:
        _log.warning("torch's attention is used, not our own: %s", error)
        return
    for module in model.modules():
        if attention is not None and isinstance(module, (Layer, ContextBlock, ImageEncoder)):
            module.fused = attention


def _can_compile() -> bool:
    """Whether there is a C++ compiler; the logger is told if not."""
    try:
        command = compiler()[0]
        if shutil.which(command) is not None:
            return True
        reason = f"the C++ compiler {command!r} is not there"
    except BuildError as error:
        reason = str(error)
    _log.warning("nothing is compiled: %s", reason)
    return False


class _Compiled:
    """A function by torch.compile, and as it was once torch cannot compile it."""

    def __init__(self, function: Callable[..., Any], dynamic: bool) -> None:
        from torch._dynamo.exc import TorchDynamoException  # here, since it takes a second

        self._plain, self._error = function, TorchDynamoException
        # the default of 8 natures would leave the ninth to the slow path for good; as a setting of
        # torch's it would hold in this thread alone
        self._run = torch.compile(  # type: ignore[call-overload]
            function, dynamic=dynamic, recompile_limit=64
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(*args, **kwargs)
        except self._error as error:  # before anything was run
            failed = error
        out = self._plain(*args, **kwargs)  # which tells if the arguments were to blame
        reason = first_error(str(failed)) or repr(failed)
        _log.warning("%s is not compiled: %s", self._plain.__qualname__, reason)
        self._run = self._plain
        return out


def compile_layers(model: FlowPokeTransformer) -> None:
    """Let torch.compile fuse what lies between the matrix products of a prepared model's layers.

    All layers share one function. It is compiled for each nature of shapes (none, one or
    several of hypotheses, pokes, queries) when that is first met: seconds, fewer in later
    processes.
    """
    varying, of_one_image = True, False
    layers: list[nn.Module] = list(model.layers)
    parts: list[tuple[list[nn.Module], str, bool]] = [
        (layers, "forward", varying),
        (layers, "image_memory", of_one_image),
        (list(model.embed.blocks), "forward", varying),
        ([model.head], "forward", varying),
    ]
    if model.encoder.convolutional:
        parts.append((list(model.encoder.context.blocks), "forward", of_one_image))
    if model.encoder.detail is not None:
        parts.append(([model.encoder.detail], "forward", of_one_image))
    for modules, name, dynamic in parts:
        function = _Compiled(getattr(type(modules[0]), name), dynamic)
        for module in modules:
            setattr(module, name, partial(function, module))
