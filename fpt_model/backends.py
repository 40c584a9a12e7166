# SPDX-License-Identifier: MIT
"""Choosing what runs a model, and saying so when it is not what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fpt_model.engine import PRECISIONS, BackendError, Engine, TorchEngine
from fpt_model.graphs import PRECISIONS as GRAPH_PRECISIONS
from fpt_model.model import FlowPokeTransformer

Backend = Literal["torch", "onnxruntime"]
Choice = Literal["auto", Backend]
"""Of a backend; auto: ONNX Runtime where graphs are given, PyTorch otherwise.

On a CPU ONNX Runtime in fp32 encodes faster and answers a little slower (docs/backends.md).
"""
Precision = Literal["fp32", "bf16", "fp16", "int8"]
PROVIDERS = {  # of ONNX Runtime, by the names that users give
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}

_log = logging.getLogger("fpt_model")


@dataclass(frozen=True)
class Active:
    """What runs a model, after all."""

    engine: Engine
    backend: Backend
    precision: Precision


def chosen_backend(backend: Choice, graphs: str | Path | None) -> Backend:
    """What is tried first."""
    if backend == "auto":
        return "onnxruntime" if graphs else "torch"
    return backend


def open_engine(
    model: FlowPokeTransformer,
    backend: Choice,
    device: str,
    precision: Precision,
    graphs: str | Path | None,
    providers: Sequence[str],
    strict: bool,
    compile: bool = False,
    in_place: bool = False,
) -> Active:
    """See :class:`~fpt_model.predictor.FlowPredictor`, which has these arguments."""
    chosen = chosen_backend(backend, graphs)
    for name, value, choices in (
        ("backend", backend, get_args(Choice)),
        ("precision", precision, get_args(Precision) if chosen != "torch" else tuple(PRECISIONS)),
        *(("providers", provider, tuple(PROVIDERS)) for provider in providers),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, received {value!r}")
    if not providers or len(set(providers)) != len(providers):
        raise ValueError(f"providers must name each provider once, received {list(providers)}")
    if chosen == "torch" and tuple(providers) != ("cpu",):
        names = ", ".join(providers)
        _tell_idle(
            f"providers {names}: they are ONNX Runtime's, and PyTorch runs on {device}", strict
        )
    if chosen == "onnxruntime":
        try:
            engine = _open_onnx(model, device, precision, graphs, providers, strict)
            if compile:
                _tell_idle("compile: it is PyTorch's, and ONNX Runtime runs graphs", strict)
            return Active(engine, "onnxruntime", precision)
        except BackendError as error:
            if strict:
                raise
            # what PyTorch has not (fp16, int8) becomes the exact one
            precision = precision if precision in PRECISIONS else "fp32"
            _log.warning("PyTorch runs the model in %s, not ONNX Runtime: %s", precision, error)
    return Active(TorchEngine(model, device, precision, compile, in_place), "torch", precision)


def _tell_idle(what: str, strict: bool) -> None:
    """Of what was asked for and does nothing."""
    if strict:
        raise BackendError(f"cannot use {what}")
    _log.warning("not used: %s", what)


def _open_onnx(
    model: FlowPokeTransformer,
    device: str,
    precision: Precision,
    graphs: str | Path | None,
    providers: Sequence[str],
    strict: bool,
) -> Engine:
    if precision not in GRAPH_PRECISIONS:
        raise BackendError(
            f"ONNX Runtime has the precisions {', '.join(GRAPH_PRECISIONS)}, not {precision}"
        )
    if not graphs:
        raise BackendError(
            "no folder of exported graphs was given; fpt export --model MODEL --out FOLDER "
            "writes one"
        )
    try:
        from fpt_model.onnx_engine import OnnxEngine
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed (pip install onnxruntime, or onnxruntime-gpu instead "
            f"of it): {error}"
        ) from error
    return OnnxEngine(model, graphs, precision, tuple(providers), device, strict)
