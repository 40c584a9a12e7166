# SPDX-License-Identifier: MIT
"""ONNX Runtime as an engine, on the exported graphs of :mod:`fpt_model.graphs`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from fpt_model import tensorrt
from fpt_model.backends import PROVIDERS
from fpt_model.engine import Array, BackendError, parse_device
from fpt_model.graphs import Half, Manifest, bucket, chunks
from fpt_model.model import FlowPokeTransformer

_NAMES = {full: short for short, full in PROVIDERS.items()}

Features = dict[str, Any]  # by name: OrtValue, on the provider's device

_log = logging.getLogger("fpt_model")


@dataclass(frozen=True)
class PokeList:
    """The pokes so far. The graphs keep nothing of them: every run runs all of them."""

    pos: Array  # [B, P, 2]
    flow: Array  # [B, P, D]

    @property
    def pokes(self) -> int:
        """P."""
        return self.pos.shape[1]

    def with_room(self, batch: int, room: int) -> PokeList:
        """:meth:`fpt_model.engine.Context.with_room`."""
        return PokeList(np.repeat(self.pos, batch, 0), np.repeat(self.flow, batch, 0))

    def append(self, pos: Array, flow: Array) -> PokeList:
        """With more pokes ``[B, P, 2]``, ``[B, P, D]`` behind them."""
        return PokeList(np.concatenate([self.pos, pos], 1), np.concatenate([self.flow, flow], 1))


class OnnxEngine:
    """ONNX Runtime. See :class:`fpt_model.engine.Engine`.

    Args:
        model: that the graphs were exported from.
        graphs: the folder that they are in.
        providers: "tensorrt", "cuda" and "cpu", the first preferred.
        device: "cuda:1" is the second GPU.
        strict: refuse to run on other providers than those; otherwise that is logged.

    Raises BackendError saying what is missing.
    """

    def __init__(
        self,
        model: FlowPokeTransformer,
        graphs: str | Path,
        precision: str,
        providers: Sequence[str],
        device: str = "cpu",
        strict: bool = False,
    ) -> None:
        self._manifest = manifest = Manifest.read(graphs)
        manifest.check_model(model)
        self._raw_dim = model.config.raw_dim
        wanted = parse_device(device)
        if wanted.type != "cpu" and not {"cuda", "tensorrt"} & set(providers):
            text = (
                f"the device {device!r} needs the provider tensorrt or cuda, received "
                f"{', '.join(providers)}"
            )
            if strict:
                raise BackendError(text)
            _log.warning("%s: the model runs on the CPU", text)
        index = wanted.index or 0
        self._encoder, first = open_session(
            manifest, precision, "encoder", providers, index, strict
        )
        self._decoder, second = open_session(
            manifest, precision, "decoder", providers, index, strict
        )
        self.providers = tuple(p for p in first if p in second)
        self._memory = "cpu" if self.providers[0] == "cpu" else "cuda"
        self._index = 0 if self._memory == "cpu" else index
        self.device = "cpu" if self._memory == "cpu" else f"cuda:{index}"

    def encode(self, image: Array) -> Features:
        """:meth:`fpt_model.engine.Engine.encode`."""
        names = [output.name for output in self._encoder.get_outputs()]
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("image", np.ascontiguousarray(image))
        for name in names:
            binding.bind_output(name, self._memory, self._index)
        self._encoder.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def run(
        self,
        features: Features,
        past: PokeList | None,
        poke_pos: Array,
        poke_flow: Array,
        query_pos: Array,
        camera_static: bool,
    ) -> tuple[Array, PokeList]:
        """:meth:`fpt_model.engine.Engine.run`."""
        pokes = PokeList(poke_pos, poke_flow)
        if past is not None:
            pokes = past.append(poke_pos, poke_flow)
        raw = np.empty((*query_pos.shape[:2], self._raw_dim), np.float32)
        for rows in chunks(raw.shape[0], self._manifest.batch_buckets):
            for columns in chunks(raw.shape[1], self._manifest.query_buckets):
                raw[rows, columns] = self._decode(
                    features,
                    pokes.pos[rows],
                    pokes.flow[rows],
                    query_pos[rows, columns],
                    camera_static,
                )
        return raw, pokes

    def _decode(
        self, features: Features, pos: Array, flow: Array, queries: Array, camera_static: bool
    ) -> Array:
        batch, count, pokes = *queries.shape[:2], pos.shape[1]
        b = bucket(batch, self._manifest.batch_buckets)
        p = bucket(pokes, self._manifest.poke_buckets)
        q = bucket(count, self._manifest.query_buckets)
        feeds = {
            "poke_pos": _padded(pos, b, p),
            "poke_flow": _padded(flow, b, p),
            "query_pos": _padded(queries, b, q),
            "camera_static": np.full(b, int(camera_static), np.int64),
            "visible": np.full(q, pokes, np.int64),
        }
        binding = self._decoder.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, value in features.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("raw", "cpu")
        self._decoder.run_with_iobinding(binding)
        raw: Array = binding.get_outputs()[0].numpy()
        return raw[:batch, :count]


def _padded(x: Array, rows: int, columns: int) -> Array:
    """``[B, N, C]`` with zeros behind, ``[rows, columns, C]``."""
    out = np.zeros((rows, columns, x.shape[2]), np.float32)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def open_session(
    manifest: Manifest,
    precision: str,
    half: Half,
    providers: Sequence[str],
    index: int = 0,
    strict: bool = False,
) -> tuple[ort.InferenceSession, tuple[str, ...]]:
    """A session on a verified graph, and the providers that it really runs on.

    ``index`` is the GPU's. A provider that fails is left out, which is logged; BackendError when
    ``strict``, or when none is left.
    """
    path = manifest.verified(precision, half)
    built_in = ort.get_available_providers()
    reasons = [f"this ONNX Runtime has no {p}" for p in providers if PROVIDERS[p] not in built_in]
    candidates = [p for p in providers if PROVIDERS[p] in built_in] or ["cpu"]
    session = None
    while session is None:
        try:
            session = _session(manifest, path, precision, half, candidates, index)
        except Exception as error:  # ONNX Runtime's have no common type
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            reasons.append(f"{candidates.pop(0)}: {reason}")
            if not candidates:
                raise BackendError(f"cannot run {path}: {'; '.join(reasons)}") from error
    session.disable_fallback()  # a failure while running is an error, not another provider
    active = tuple(_NAMES.get(p, p) for p in session.get_providers())
    if active[: len(providers)] != tuple(providers):
        text = (
            f"{path.name} was asked to run on {', '.join(providers)} and runs on "
            f"{', '.join(active)}" + "".join(f"; {reason}" for reason in reasons)
        )
        if strict:
            raise BackendError(text)
        _log.warning("%s", text)
    return session, active


def _session(
    manifest: Manifest,
    path: Path,
    precision: str,
    half: Half,
    providers: Sequence[str],
    index: int,
) -> ort.InferenceSession:
    def open_with(trt: dict[str, Any]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # one rule for both backends
        by_provider = {"tensorrt": trt, "cuda": {"device_id": index, "use_tf32": 0}}
        return ort.InferenceSession(
            str(path),
            options,
            providers=[(PROVIDERS[p], by_provider.get(p, {})) for p in providers],
            enable_fallback=False,
        )

    if "tensorrt" not in providers:
        return open_with({})
    return tensorrt.EngineCache.of(manifest, precision, half, index).open(open_with)
