# SPDX-License-Identifier: MIT
"""Writing a model as the ONNX graphs that :mod:`fpt_model.graphs` describes."""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from fpt_model import tensorrt
from fpt_model.engine import prepare
from fpt_model.graphs import (
    BATCH_BUCKETS,
    HALVES,
    MANIFEST,
    POKE_BUCKETS,
    PRECISIONS,
    QUERY_BUCKETS,
    Graph,
    Half,
    Manifest,
    file_sha256,
    model_sha256,
)
from fpt_model.model import FlowPokeTransformer, ImageFeatures

OPSET = 18  # grid_sample needs 16; 18 is what torch's exporter writes without converting
_BLOCK = 32  # weights that share a scale in "int8"
_UNFINISHED = ".unfinished"  # folder of an export at work
_LARGEST_FILE = 1536 * 2**20  # bytes; torch puts more into a second file, which nothing verifies


class Encoder(nn.Module):
    """The encoder graph. ``model`` was prepared for inference."""

    def __init__(self, model: FlowPokeTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.encode(image)
        return (*features.maps, *(t for pair in features.memory for t in pair))


class Decoder(nn.Module):
    """The decoder graph. ``model`` was prepared for inference."""

    def __init__(self, model: FlowPokeTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor,
        visible: Tensor,
        features: tuple[Tensor, ...],
    ) -> Tensor:
        maps = len(self.model.encoder.dims)
        memory = list(zip(features[maps::2], features[maps + 1 :: 2], strict=True))
        return self.model.forward_raw(
            ImageFeatures(list(features[:maps]), memory),
            poke_pos,
            poke_flow,
            query_pos,
            camera_static,
            visible,
        )


def feature_names(model: FlowPokeTransformer) -> list[str]:
    """Names of the encoder's outputs, which are inputs of the decoder."""
    layers = range(model.config.depth)
    names = [f"map_{i}" for i in range(len(model.encoder.dims))]
    return names + [name for i in layers for name in (f"key_{i}", f"value_{i}")]


def export(
    model: FlowPokeTransformer, out: Path, precisions: Sequence[str] = ("fp32",)
) -> Manifest:
    """Write both graphs in each precision, and their manifest, into the folder ``out``.

    An earlier export there is replaced, with the TensorRT engines of its graphs.

    Args:
        precisions: "fp32"; "fp16": as in :func:`fpt_model.engine.prepare`, positions, angles and
            scales stay float32; "int8": float32 with the matrices' weights in 8 bits, scaled in
            blocks, which ONNX Runtime's own operator MatMulNBits multiplies in float32.

    Raises ValueError for an unknown precision, a folder of other things, or a model whose graphs
    are too large for one file; ImportError without onnx and onnxscript, for "int8" onnxruntime.
    """
    import onnx  # noqa: F401  # torch's exporter needs both; say so before the work
    import onnxscript  # noqa: F401

    if "int8" in precisions:
        import onnxruntime  # noqa: F401
    unknown = [p for p in precisions if p not in PRECISIONS]
    if unknown or not precisions:
        raise ValueError(
            f"precisions must be of {', '.join(PRECISIONS)}, received {list(precisions)}"
        )
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > _LARGEST_FILE:
        raise ValueError(
            f"the weights of {model.config.name!r} must be at most {_LARGEST_FILE} bytes, "
            f"received {size}"
        )
    identity = model_sha256(model)
    out.mkdir(parents=True, exist_ok=True)
    graph_files = {_file_name(half, precision) for half in HALVES for precision in PRECISIONS}
    unfinished = out / _UNFINISHED
    ours = {MANIFEST, tensorrt.FOLDER, unfinished.name, *graph_files}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in ours)
    if foreign:
        raise ValueError(
            f"expected an empty folder or an earlier export, {str(out)!r} holds {foreign[0]!r}"
        )
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        graphs: dict[str, dict[Half, Graph]] = {}
        for precision in sorted(set(precisions), key=PRECISIONS.index):
            files = {half: unfinished / _file_name(half, precision) for half in HALVES}
            if precision == "int8" and "fp32" in graphs:
                for half, path in files.items():
                    shutil.copy(unfinished / graphs["fp32"][half].file, path)
            else:
                _write(model, torch.float16 if precision == "fp16" else torch.float32, files)
            if precision == "int8":
                for path in files.values():
                    _quantize_weights(path)
            graphs[precision] = {half: _describe(path) for half, path in files.items()}
        # the earlier export stays until here; while graphs and manifest do not belong together
        # there is none
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(out / tensorrt.FOLDER, ignore_errors=True)
        for name in graph_files:
            (out / name).unlink(missing_ok=True)
        for path in unfinished.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    manifest = Manifest(
        folder=out,
        model=model.config.name,
        model_sha256=identity,
        licence=model.config.licence,
        opset=OPSET,
        exported_with={name: version(name) for name in ("torch", "onnx", "onnxscript")},
        batch_buckets=BATCH_BUCKETS,
        poke_buckets=POKE_BUCKETS,
        query_buckets=QUERY_BUCKETS,
        graphs=graphs,
    )
    manifest.write()
    return manifest


def _write(model: FlowPokeTransformer, dtype: torch.dtype, files: dict[Half, Path]) -> None:
    prepared = prepare(model, torch.device("cpu"), dtype)
    for module in prepared.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(dtype)  # the exporter folds it into a convolution, which has one type
    config, names = model.config, feature_names(model)
    image = torch.zeros(1, 3, config.image_size, config.image_size)
    # sizes that differ, and none of one, which the exporter would take for fixed
    b, p, q = 2, 3, 5
    pos, flow = torch.full((b, p, 2), 0.5), torch.zeros(b, p, config.flow_dim)
    queries = torch.full((b, q, 2), 0.5)
    static, visible = torch.zeros(b, dtype=torch.long), torch.full((q,), p)
    # with gradients enabled the model writes into no buffers, which graphs have not
    with torch.enable_grad(), _quiet():
        features = Encoder(prepared)(image)
        encoder = torch.onnx.export(
            Encoder(prepared),
            (image,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=names,
            verbose=False,
        )
        dim = torch.export.Dim
        batch, pokes, points = dim("batch"), dim("pokes"), dim("queries")
        decoder = torch.onnx.export(
            Decoder(prepared),
            (pos, flow, queries, static, visible, features),
            dynamo=True,
            opset_version=OPSET,
            input_names=[
                *("poke_pos", "poke_flow", "query_pos", "camera_static", "visible"),
                *names,
            ],
            output_names=["raw"],
            dynamic_shapes=(
                {0: batch, 1: pokes},
                {0: batch, 1: pokes},
                {0: batch, 1: points},
                {0: batch},
                {0: points},
                tuple({} for _ in features),
            ),
            verbose=False,
        )
    assert encoder is not None
    assert decoder is not None
    shape = decoder.model.graph.outputs[0].shape
    assert shape is not None
    shape[1] = "queries"  # the exporter says queries + pokes - pokes
    encoder.save(files["encoder"])
    decoder.save(files["decoder"])


def _file_name(half: Half, precision: str) -> str:
    return f"{half}.{precision}.onnx"


def _quantize_weights(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    nbits.logger.setLevel(logging.WARNING)  # it tells of every node
    # accuracy level 0 multiplies in float32; level 4, 8-bit activations, costs too much accuracy
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(path), bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=0
    )
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def _describe(path: Path) -> Graph:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph

    def tensors(infos: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[str, list[int | str]]]:
        return {
            info.name: (
                onnx.TensorProto.DataType.Name(info.type.tensor_type.elem_type).lower(),
                [side.dim_param or side.dim_value for side in info.type.tensor_type.shape.dim],
            )
            for info in infos
        }

    return Graph(path.name, file_sha256(path), tensors(graph.input), tensors(graph.output))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
