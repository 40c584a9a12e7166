# SPDX-License-Identifier: MIT
"""Exported graphs, ONNX Runtime against PyTorch, the choice of a backend, TensorRT's cache."""

import copy
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from closeness import assert_close, assert_mixtures_close
from compilers import needs_compiler
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import Client, Process, python_module
from numpy.typing import NDArray
from reference_weights import weight

from fpt_model import (
    FPT_BASE,
    BackendError,
    FlowPokeTransformer,
    FlowPredictor,
    FPTConfig,
    load_model,
    save_model,
)
from fpt_model.agreement import MAX_RAW_FP32, Agreement, agreement
from fpt_model.export import OPSET, export
from fpt_model.graphs import Manifest, bucket, chunks
from fpt_model.onnx_engine import OnnxEngine
from fpt_model.tensorrt import (
    EngineCache,
    EngineIdentity,
    Profile,
    build_engine,
    provider_options,
)
from fpt_ros.cli import main
from fpt_ros.environment import claim_domain_id
from sim import Simulator

SMALL_3D = FPTConfig(
    name="small-3d",
    encoder="vit_tiny_patch16_224",
    encoder_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    image_size=32,
    width=48,
    depth=2,
    head_dim=16,
    position_bands=2,
    flow_dim=3,
    sample_align_corners=True,  # fpt-tiny has False
    head="reference",
    kl_threshold=0.05,
)


def seeded(config: FPTConfig, seed: int = 1234) -> FlowPokeTransformer:
    """A model with plausible weights, all in use."""
    model = FlowPokeTransformer(config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict({key: weight(seed, key, shape) for key, shape in shapes.items()})
    return model.eval()


class Exported:
    """A model with its graphs."""

    def __init__(self, model: FlowPokeTransformer, folder: Path, *precisions: str) -> None:
        self.model, self.folder = model, folder
        self.manifest = export(model, folder, precisions)

    def predictor(self, precision: str = "fp32", **kwargs: Any) -> FlowPredictor:
        kwargs = {"graphs": self.folder, "strict": True} | kwargs
        return FlowPredictor(self.model, "onnxruntime", precision=precision, **kwargs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("tiny")
    return Exported(load_model("fpt-tiny"), folder, "fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(seeded(SMALL_3D), tmp_path_factory.mktemp("small"), "fp32")


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return Simulator("drawer", 3, (240, 320)).render().rgb


def questions(dims: int, batch: int, pokes: int, queries: int, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    return (
        rng.random((batch, pokes, 2)),
        rng.normal(0, 0.1, (batch, pokes, dims)),
        rng.random((queries, 2)),
    )


# --- graphs --------------------------------------------------------------------------------------


def test_buckets() -> None:
    assert [bucket(n, (1, 4, 16)) for n in (0, 1, 2, 4, 16, 17, 33)] == [1, 1, 4, 4, 16, 32, 48]
    assert list(chunks(33, (1, 4, 16))) == [slice(0, 16), slice(16, 32), slice(32, 33)]
    assert list(chunks(0, (1, 4))) == []


def test_graphs_are_as_the_manifest_says(tiny: Exported) -> None:
    for precision, halves in Manifest.read(tiny.folder).graphs.items():
        for half, described in halves.items():
            model = onnx.load(tiny.folder / described.file)
            assert {i.domain: i.version for i in model.opset_import}[""] == OPSET
            assert [i.name for i in model.graph.input] == list(described.inputs)
            assert [o.name for o in model.graph.output] == list(described.outputs)
            # float64 has no place on a GPU; the mixture, which needs it, is made outside
            values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
            types = {value.type.tensor_type.elem_type for value in values}
            types |= {tensor.data_type for tensor in model.graph.initializer}
            assert onnx.TensorProto.DOUBLE not in types, (precision, half)
    decoder, encoder = (tiny.manifest.graph("fp32", half) for half in ("decoder", "encoder"))
    assert decoder.inputs["poke_flow"] == ("float", ["batch", "pokes", 2])
    assert decoder.inputs["visible"] == ("int64", ["queries"])
    assert decoder.outputs == {"raw": ("float", ["batch", "queries", 24])}
    assert list(decoder.inputs)[5:] == list(encoder.outputs)
    cells = (load_model("fpt-tiny").config.image_size // 8) ** 2
    assert encoder.outputs["key_3"] == ("float", [1, 3, cells, 64])


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex'"):
        export(seeded(SMALL_3D), tmp_path)
    (tmp_path / "thesis.tex").rename(tmp_path / "yolo.onnx")
    with pytest.raises(ValueError, match=r"holds 'yolo.onnx'"):
        export(seeded(SMALL_3D), tmp_path)
    assert (tmp_path / "yolo.onnx").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"precisions must be of .*received \['fp8'\]"):
        export(seeded(SMALL_3D), tmp_path / "new", ["fp8"])
    assert not (tmp_path / "new").exists()


def test_an_export_that_fails_leaves_the_earlier_one(
    small: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "graphs"
    shutil.copytree(small.folder, folder)

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("fpt_model.export._describe", full)
    with pytest.raises(OSError, match="No space left"):
        export(small.model, folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in small.folder.iterdir()}
    assert FlowPredictor(small.model, graphs=folder, strict=True).backend == "onnxruntime"


# --- against PyTorch -----------------------------------------------------------------------------

SIZES = [(1, 0, 7), (1, 1, 1), (1, 5, 64), (3, 3, 10), (17, 0, 2), (2, 130, 1030)]


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("camera_static", [True, False], ids=["static", "moving"])
def test_raw_outputs_equal_pytorchs(
    request: pytest.FixtureRequest, image: NDArray[np.uint8], name: str, camera_static: bool
) -> None:
    exported: Exported = request.getfixturevalue(name)
    ours, theirs = exported.predictor(), FlowPredictor(exported.model)
    assert (ours.backend, ours.providers, ours.device) == ("onnxruntime", ("cpu",), "cpu")
    scenes = [(p, p.encode(image)) for p in (ours, theirs)]
    for sizes in SIZES if camera_static else SIZES[:2]:
        asked = questions(ours.config.flow_dim, *sizes)
        own, other = (p.raw(scene, *asked, camera_static) for p, scene in scenes)
        assert own.shape == (sizes[0], sizes[2], ours.config.raw_dim)
        assert_close(own, other, MAX_RAW_FP32)


def test_pokes_of_unknown_depth_equal_pytorchs(small: Exported, image: NDArray[np.uint8]) -> None:
    pos, flow, queries = questions(3, 2, 3, 20)
    flow[0, :, 2], flow[1, 0, 2] = np.nan, np.nan
    ours, theirs = (
        p.raw(p.encode(image), pos, flow, queries)
        for p in (small.predictor(), FlowPredictor(small.model))
    )
    assert np.isfinite(ours).all()
    assert_close(ours, theirs, MAX_RAW_FP32)


def test_joint_sampling_equals_pytorchs(small: Exported, image: NDArray[np.uint8]) -> None:
    """Step by step, both given the same motions: a draw's rounding grows in the next ones."""
    pos, flow, queries = questions(3, 1, 2, 4)
    both = [
        p.sampling_steps(p.encode(image), pos[0], flow[0], np.stack([queries, queries[::-1]]))
        for p in (small.predictor(), FlowPredictor(small.model))
    ]
    own, other = (next(steps) for steps in both)
    for drawn in np.random.default_rng(1).normal(0, 0.1, (3, 2, 3)):
        assert_mixtures_close(own, other)
        own, other = (steps.send(drawn) for steps in both)
    assert_mixtures_close(own, other)
    predictor = small.predictor()
    samples = predictor.sample(predictor.encode(image), pos[0], flow[0], queries, 3)
    assert samples.shape == (3, 4, 3)


def test_padding_changes_nothing(tiny: Exported, tmp_path: Path, image: NDArray[np.uint8]) -> None:
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    exact = dataclasses.replace(
        tiny.manifest,
        folder=tmp_path,
        batch_buckets=(3,),
        poke_buckets=(5,),
        query_buckets=(7,),
    )
    exact.write()
    asked = questions(2, 3, 5, 7)
    unpadded, padded = (
        p.raw(p.encode(image), *asked) for p in (tiny.predictor(graphs=tmp_path), tiny.predictor())
    )
    assert_close(padded, unpadded, 1e-5)
    assert not np.array_equal(padded, padded[:, ::-1])


def test_reduced_precisions_hold(tiny: Exported, image: NDArray[np.uint8]) -> None:
    by_torch = FlowPredictor(tiny.model, precision="bf16")
    for precision in ("fp16", "int8", "bf16"):
        candidate = by_torch if precision == "bf16" else tiny.predictor(precision)
        found = agreement(FlowPredictor(tiny.model), candidate, [image])
        assert found.violations(precision) == [], (precision, found)
        assert found.raw > MAX_RAW_FP32, precision  # it is another precision at all


def test_the_gate_finds_what_differs(small: Exported, image: NDArray[np.uint8]) -> None:
    other = FlowPredictor(seeded(SMALL_3D, seed=1))
    found = agreement(FlowPredictor(small.model), other, [image])
    assert len(found.violations("fp32")) == 3, found
    broken = Agreement(images=1, raw=np.nan, flow_px=np.nan, kl=np.nan, mask_iou=np.nan)
    assert len(broken.violations("fp32")) == 3
    with pytest.raises(ValueError, match="at least one image"):
        agreement(other, other, [])


@pytest.mark.skipif("FPT_TEST_BASE" not in os.environ, reason="FPT_TEST_BASE: minutes and 6 GB")
def test_base_equals_pytorchs(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    base = Exported(seeded(FPT_BASE), tmp_path, "fp32")
    scenes = [(p, p.encode(image)) for p in (base.predictor(), FlowPredictor(base.model))]
    for sizes in ((1, 0, 16), (1, 5, 16), (3, 2, 70)):
        asked = questions(2, *sizes)
        own, other = (p.raw(scene, *asked) for p, scene in scenes)
        print(f"raw outputs of {sizes} differ by {np.abs(own - other).max():.2g}")
        assert_close(own, other, MAX_RAW_FP32)


# --- choosing a backend --------------------------------------------------------------------------


def damage_graph(folder: Path) -> None:
    path = folder / "decoder.fp32.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1}')


def remove_graph(folder: Path) -> None:
    (folder / "encoder.fp32.onnx").unlink()


def change_manifest(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | values))


def change_model(folder: Path) -> None:
    change_manifest(folder, model_sha256="0" * 64)


def empty_buckets(folder: Path) -> None:
    change_manifest(folder, query_buckets=[])


def leave_the_folder(folder: Path) -> None:
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"]
    graphs["fp32"]["encoder"]["file"] = "../encoder.onnx"
    change_manifest(folder, graphs=graphs)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "no exported graphs in"),
        (damage_graph, "decoder.fp32.onnx is damaged, export again"),
        (damage_manifest, "manifest.json is not a usable manifest"),
        (remove_graph, "encoder.fp32.onnx is missing"),
        (change_model, "were exported from another model than 'small-3d'"),
        (empty_buckets, "query_buckets must be growing numbers from 1 to 65536, received"),
        (leave_the_folder, "expected graphs in its folder, received '../encoder.onnx'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unusable_graphs_are_refused_or_replaced_by_pytorch(
    small: Exported,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
    reason: str,
) -> None:
    folder = tmp_path / "graphs"
    shutil.copytree(small.folder, folder)
    spoil(folder)
    with pytest.raises(BackendError, match=reason):
        small.predictor(graphs=folder)
    instead = small.predictor(graphs=folder, strict=False)
    assert (instead.backend, instead.providers) == ("torch", ())
    assert "PyTorch runs the model in fp32, not ONNX Runtime" in caplog.text
    assert reason in caplog.text


def test_another_threshold_needs_no_other_graphs(small: Exported) -> None:
    model = copy.copy(small.model)
    model.config = dataclasses.replace(model.config, kl_threshold=2.0, name="renamed")
    assert FlowPredictor(model, graphs=small.folder, strict=True).backend == "onnxruntime"
    model.config = dataclasses.replace(model.config, flow_prescale=2.0)
    with pytest.raises(BackendError, match="another model than 'renamed'"):
        FlowPredictor(model, graphs=small.folder, strict=True)


def test_without_onnx_runtime_pytorch_runs(
    small: Exported, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "fpt_model.onnx_engine")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # so that importing it fails
    with pytest.raises(BackendError, match="ONNX Runtime is not installed"):
        small.predictor()
    assert small.predictor("fp16", strict=False).precision == "fp32"
    assert "PyTorch runs the model in fp32, not ONNX Runtime" in caplog.text


def test_the_real_providers_are_read_back(
    small: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ["tensorrt", "cuda", "cpu"]
    with pytest.raises(BackendError, match=r"asked to run on tensorrt, cuda, cpu and runs on cpu"):
        small.predictor(providers=asked)
    caplog.clear()
    instead = small.predictor(providers=asked, strict=False)
    assert (instead.backend, instead.providers, instead.device) == ("onnxruntime", ("cpu",), "cpu")
    assert "and runs on cpu; this ONNX Runtime has no tensorrt; " in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_what_does_nothing_for_the_chosen_backend_is_told(
    small: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU asked for by providers and graphs forgotten would be a silent fallback to the CPU."""
    cuda = {"providers": ["cuda", "cpu"]}
    with pytest.raises(BackendError, match=r"cannot use providers cuda, cpu: they are ONNX Runtim"):
        FlowPredictor(small.model, strict=True, **cuda)  # type: ignore[arg-type]
    assert FlowPredictor(small.model, **cuda).backend == "torch"  # type: ignore[arg-type]
    assert "not used: providers cuda, cpu" in caplog.text
    with pytest.raises(BackendError, match="cannot use compile: it is PyTorch's"):
        small.predictor(compile=True)
    caplog.clear()
    assert small.predictor(compile=True, strict=False).backend == "onnxruntime"
    assert "not used: compile" in caplog.text
    caplog.clear()
    compiled = small.predictor(compile=True, strict=False, graphs=None)
    assert compiled.backend == "torch"
    assert "not used" not in caplog.text, "PyTorch, which runs instead, compiles"


def test_a_device_that_no_provider_runs_on_is_told(
    small: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        BackendError, match="'cuda:1' needs the provider tensorrt or cuda, received"
    ):
        small.predictor(device="cuda:1")
    assert small.predictor(device="cuda", strict=False).device == "cpu"
    assert "received cpu: the model runs on the CPU" in caplog.text


def test_exporting_leaves_the_global_generator_alone_and_takes_bfloat16(tmp_path: Path) -> None:
    model, state = seeded(SMALL_3D).bfloat16(), torch.get_rng_state()
    folder = tmp_path / "graphs"
    export(model, folder)
    assert torch.equal(state, torch.get_rng_state())
    assert FlowPredictor(model, "onnxruntime", graphs=folder, strict=True).backend == "onnxruntime"


def test_without_a_choice_graphs_are_run_where_there_are_some(small: Exported) -> None:
    assert FlowPredictor(small.model, graphs=small.folder).backend == "onnxruntime"
    assert FlowPredictor(small.model).backend == "torch"
    assert FlowPredictor(small.model, "torch", graphs=small.folder).backend == "torch"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "onnx"}, ValueError, "backend must be one of auto, torch, onnxr"),
        ({"precision": "fp8"}, ValueError, "precision must be one of fp32, bf16, received 'fp8'"),
        ({"device": "gpu"}, ValueError, "device must be one of torch's, received 'gpu'"),
        ({"providers": ["rocm"]}, ValueError, "providers must be one of tensorrt, cuda, cpu, rec"),
        ({"providers": []}, ValueError, r"name each provider once, received \[\]"),
        ({"backend": "onnxruntime", "strict": True}, BackendError, "no folder of exported graphs"),
        (
            {"backend": "onnxruntime", "precision": "bf16", "strict": True},
            BackendError,
            "ONNX Runtime has the precisions fp32, fp16, int8, not bf16",
        ),
    ],
)
def test_wrong_arguments_are_named(
    small: Exported, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FlowPredictor(small.model, **arguments)


def test_a_precision_that_was_not_exported(small: Exported) -> None:
    with pytest.raises(BackendError, match=r"has no int8 graphs, only fp32; export again with all"):
        small.predictor("int8")


# --- TensorRT ------------------------------------------------------------------------------------


def identity(**changes: Any) -> EngineIdentity:
    profile = Profile({"x": (1, 2)}, {"x": (4, 2)}, {"x": (16, 2)})
    own = EngineIdentity("ab" * 32, "fp16", profile, "10.9", "1.32.0", "Orin 8.7")
    return dataclasses.replace(own, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("graph_sha256", "cd" * 32),
        ("precision", "fp32"),
        ("profile", Profile({"x": (1, 2)}, {"x": (4, 2)}, {"x": (17, 2)})),
        ("tensorrt", "10.10"),
        ("onnxruntime", "1.33.0"),
        ("gpu", "Orin 8.9"),
    ],
)
def test_an_engines_identity_is_all_it_depends_on(field: str, value: Any) -> None:
    assert field in {f.name for f in dataclasses.fields(EngineIdentity)}
    assert identity(**{field: value}).digest != identity().digest
    assert identity().digest == identity().digest


def test_tensorrt_options(small: Exported, tmp_path: Path) -> None:
    decoder = Profile.of(small.manifest, "fp32", "decoder")
    options = provider_options(tmp_path, decoder, 1)
    # as documented for ONNX Runtime's TensorRT execution provider
    assert options == {
        "device_id": 1,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": (
            "poke_pos:1x1x2,poke_flow:1x1x3,query_pos:1x1x2,camera_static:1,visible:1"
        ),
        "trt_profile_opt_shapes": (
            "poke_pos:1x4x2,poke_flow:1x4x3,query_pos:1x1024x2,camera_static:1,visible:1024"
        ),
        "trt_profile_max_shapes": (
            "poke_pos:16x256x2,poke_flow:16x256x3,query_pos:16x1024x2,camera_static:16,visible:1024"
        ),
    }
    encoder = Profile.of(small.manifest, "fp32", "encoder")  # nothing is free
    assert not any("profile" in name for name in provider_options(tmp_path, encoder, 0))


class Builder:
    """Stands in for a session with TensorRT: builds where there is no engine, loads where one is.

    As ONNX Runtime it takes whatever engine lies there.
    """

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, options: dict[str, Any]) -> bytes:
        path = Path(options["trt_engine_cache_path"]) / "graph_sm87.engine"
        if not path.exists():
            self.built += 1
            path.write_bytes(b"engine %d" % self.built)
        if path.read_bytes() == b"unloadable":
            raise RuntimeError("could not deserialize engine")
        return path.read_bytes()


def test_engines_are_reused_only_when_vouched_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder, cache = Builder(), EngineCache(tmp_path, "decoder.fp16", identity())
    engine = cache.folder / "graph_sm87.engine"
    assert cache.open(builder) == cache.open(builder) == b"engine 1"
    assert "building a TensorRT engine in" in caplog.text
    caplog.clear()

    engine.write_bytes(b"engine X")  # damaged
    assert cache.open(builder) == b"engine 2"
    assert "is not what was recorded" in caplog.text

    (cache.folder / "record.json").unlink()  # as after an interrupted build
    assert cache.open(builder) == b"engine 3"

    (cache.folder / "record.json").write_text("{")
    assert cache.open(builder) == b"engine 4"

    engine.write_bytes(b"unloadable")  # and yet as recorded
    cache.record()
    assert cache.open(builder) == b"engine 5"
    assert "fails and is built again: could not deserialize" in caplog.text

    engine.unlink()
    assert cache.open(builder) == b"engine 6"
    assert cache.open(builder) == b"engine 6"


def test_a_trusted_engine_is_used_where_nothing_can_be_written(tmp_path: Path) -> None:
    builder, cache = Builder(), EngineCache(tmp_path, "decoder.fp16", identity())
    assert cache.open(builder) == b"engine 1"
    lock = cache.folder.with_name(f"{cache.folder.name}.lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened, as in a folder to read only, even by root
    assert cache.open(builder) == b"engine 1"
    (cache.folder / "record.json").unlink()
    with pytest.raises(BackendError, match="no TensorRT engine for this machine is in"):
        cache.open(builder)


def test_another_identity_has_another_engine(tmp_path: Path) -> None:
    builder, cache = Builder(), EngineCache(tmp_path, "decoder.fp16", identity())
    other = EngineCache(tmp_path, "decoder.fp16", identity(tensorrt="10.10"))
    assert cache.open(builder) == b"engine 1"
    assert other.open(builder) == b"engine 2"
    assert cache.open(builder) == b"engine 1"

    shutil.rmtree(other.folder)  # even in the other's folder
    shutil.copytree(cache.folder, other.folder)
    assert not other.is_trusted()
    assert other.open(builder) == b"engine 3"


def test_a_failed_build_is_not_vouched_for(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, "decoder.fp16", identity())

    def fail(options: dict[str, Any]) -> None:
        Path(options["trt_engine_cache_path"], "graph_sm87.engine").write_bytes(b"half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.open(fail)
    assert not cache.is_trusted()


def test_an_engine_without_tensorrt(small: Exported) -> None:
    if "tensorrt" in OnnxEngine(small.model, small.folder, "fp32", ["tensorrt", "cpu"]).providers:
        pytest.skip("TensorRT is here")
    with pytest.raises(BackendError, match="asked to run on tensorrt, cuda, cpu and runs on"):
        build_engine(small.manifest, "fp32", "encoder")


# --- commands and node ---------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_export_and_check_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, image: NDArray[np.uint8]
) -> None:
    model, folder, frame = tmp_path / "small.safetensors", tmp_path / "graphs", tmp_path / "a.png"
    save_model(seeded(SMALL_3D), model)
    cv2.imwrite(str(frame), image)
    check = ("check", "--model", model, "--image", frame)

    code, out, _ = run(capsys, "export", "--model", model, "--out", folder)
    assert code == 0
    graph = Manifest.read(folder).graph("fp32", "decoder")
    assert f"{folder / graph.file}: " in out
    assert f"sha256 {graph.sha256}" in out

    code, out, err = run(capsys, *check, "--graphs", folder)
    assert (code, err) == (0, "")
    assert out.endswith("\nholds\n")
    # in bfloat16 a model with random weights is too far off
    code, out, _ = run(capsys, *check, "--backend", "torch", "--precision", "bf16")
    assert code == 1
    assert "expected\n" in out

    code, _, err = run(capsys, *check, "--graphs", folder, "--providers", "tensorrt,cpu")
    assert code == 2
    assert "asked to run on tensorrt, cpu and runs on cpu" in err
    code, _, err = run(capsys, *check)
    assert code == 2
    assert "no folder of exported graphs was given" in err
    code, _, err = run(capsys, "export", "--out", folder, "--precision", "bf16")
    assert code == 2
    assert "precisions must be of fp32, fp16, int8, received ['bf16']" in err


@needs_compiler
@pytest.mark.usefixtures("build_cache")
def test_check_of_the_compiled_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, image: NDArray[np.uint8]
) -> None:
    model, frame = tmp_path / "small.safetensors", tmp_path / "a.png"
    save_model(seeded(SMALL_3D), model)
    cv2.imwrite(str(frame), image)
    check = ("check", "--model", model, "--image", frame, "--compile")
    code, out, err = run(capsys, *check, "--backend", "torch")
    assert (code, err) == (0, "")
    assert "torch, compiled, in fp32, against PyTorch in fp32; 1 pictures" in out
    assert out.endswith("\nholds\n")
    run(capsys, "export", "--model", model, "--out", tmp_path / "graphs")
    code, _, err = run(capsys, *check, "--graphs", tmp_path / "graphs")
    assert code == 2
    assert "compile: it is PyTorch's" in err


def test_predict_runs_exported_graphs(
    capsys: pytest.CaptureFixture[str], tiny: Exported, tmp_path: Path, image: NDArray[np.uint8]
) -> None:
    frame = tmp_path / "a.png"
    cv2.imwrite(str(frame), image[..., ::-1])
    asked = ("predict", frame, "--poke", "150,120,30,0", "--query", "160,130", "--json")
    means = []
    for options in ((), ("--backend", "onnxruntime", "--graphs", tiny.folder)):
        code, out, err = run(capsys, *asked, *options)
        assert code == 0, err
        means.append([mode["mean"] for mode in json.loads(out)["queries"][0]["modes"]])
    np.testing.assert_allclose(means[1], means[0], atol=0.01)  # px
    assert means[1] != means[0], "the same engine ran twice"


def test_the_node_runs_what_was_asked_or_says_so(tiny: Exported) -> None:
    domain, claim = claim_domain_id()
    node = Process(
        python_module(
            "fpt_ros.node", "-p", "autostart:=false", "-p", "backend:=onnxruntime", "-p",
            "graphs:=absent", "-p", "strict_backend:=true", "-p", "diagnostics_period_s:=0.2",
        ),
        domain,
    )  # fmt: skip
    with claim, node, Client(domain) as client:
        client.subscribe(DiagnosticArray, "/diagnostics")

        def change(transition: int) -> bool:
            request = ChangeState.Request(transition=Transition(id=transition))
            return client.call(ChangeState, "/fpt/change_state", request).success

        def set_parameter(name: str, value: Any) -> None:
            assert client.set_parameter("/fpt", name, value).successful

        def facts() -> dict[str, str]:
            client.received["/diagnostics"].clear()
            message = client.next("/diagnostics")
            return {value.key: value.value for value in message.status[0].values}

        assert not change(Transition.TRANSITION_CONFIGURE)
        node.wait_for("cannot configure")
        assert "BackendError: no exported graphs in" in node.output

        set_parameter("strict_backend", False)
        assert change(Transition.TRANSITION_CONFIGURE)
        node.wait_for("ready in")
        assert "PyTorch runs the model in fp32, not ONNX Runtime: no exported" in node.output
        values = facts()
        assert (values["backend requested"], values["backend active"]) == ("onnxruntime", "torch")
        assert values["errors: backend"] == "1"

        assert change(Transition.TRANSITION_CLEANUP)
        set_parameter("graphs", str(tiny.folder))
        assert change(Transition.TRANSITION_CONFIGURE)
        node.wait_for("on onnxruntime, cpu, cpu, fp32; ready in")
        values = facts()
        assert (values["backend active"], values["providers active"]) == ("onnxruntime", "cpu")
        assert change(Transition.TRANSITION_CLEANUP)
        assert node.interrupt() == 0, node.output
    assert "Traceback" not in node.output
