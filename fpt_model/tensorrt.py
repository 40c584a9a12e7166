# SPDX-License-Identifier: MIT
"""TensorRT under ONNX Runtime: its options, and a cache of engines that is never trusted blindly.

An engine is planned for one graph, one range of shapes, one TensorRT and one GPU, which takes
minutes. ONNX Runtime caches engines, but leaves it to the user to delete those that no longer fit
(https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html). Here each has a
folder named by everything that it depends on, and a record of its files' contents that is written
last: what is incomplete, changed or of something else is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fpt_model.engine import BackendError
from fpt_model.graphs import Half, Manifest, file_sha256

FOLDER = "engines"  # beside the graphs
RECORD = "record.json"

# what engines are tuned for; they run anything between one and the largest bucket
_OPTIMAL = {"batch": 1, "pokes": 4, "queries": 1024}
_TENSORRT_MAJORS = (11, 10)
_CUDA_MAJOR_ATTRIBUTE, _CUDA_MINOR_ATTRIBUTE = 75, 76  # of CUdevice_attribute

Shapes = dict[str, tuple[int, ...]]
Session = TypeVar("Session")

_log = logging.getLogger("fpt_model")


@dataclass(frozen=True)
class Profile:
    """The shapes of a graph's free inputs that an engine is built for; {} where none is free."""

    least: Shapes
    optimal: Shapes
    largest: Shapes

    @classmethod
    def of(cls, manifest: Manifest, precision: str, half: Half) -> Profile:
        """From one to the largest bucket of everything free."""
        largest = {
            "batch": manifest.batch_buckets[-1],
            "pokes": manifest.poke_buckets[-1],
            "queries": manifest.query_buckets[-1],
        }
        free = {
            name: shape
            for name, (_, shape) in manifest.graph(precision, half).inputs.items()
            if any(isinstance(side, str) for side in shape)
        }

        def filled(sizes: dict[str, int]) -> Shapes:
            return {
                name: tuple(side if isinstance(side, int) else sizes[side] for side in shape)
                for name, shape in free.items()
            }

        return cls(filled(dict.fromkeys(largest, 1)), filled(_OPTIMAL), filled(largest))


@dataclass(frozen=True)
class EngineIdentity:
    """Everything that an engine depends on."""

    graph_sha256: str
    precision: str
    profile: Profile
    tensorrt: str  # versions
    onnxruntime: str
    gpu: str  # name and compute capability

    @property
    def digest(self) -> str:
        """Short, and another one as soon as anything differs."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def provider_options(folder: Path, profile: Profile, index: int) -> dict[str, Any]:
    """Options of ONNX Runtime's TensorRT provider for engines in ``folder`` on GPU ``index``.

    No precision is set: without it the engine takes every tensor's type from the graph.
    """
    options: dict[str, Any] = {
        "device_id": index,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),
    }
    if profile.least:
        options |= {
            "trt_profile_min_shapes": _shapes_text(profile.least),
            "trt_profile_opt_shapes": _shapes_text(profile.optimal),
            "trt_profile_max_shapes": _shapes_text(profile.largest),
        }
    return options


def _shapes_text(shapes: Shapes) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


class EngineCache:
    """The engines of one graph, below ``root``."""

    def __init__(self, root: Path, name: str, identity: EngineIdentity, index: int = 0) -> None:
        self.identity = identity
        self.folder = root / f"{name}-{identity.digest}"
        self._index = index

    @classmethod
    def of(cls, manifest: Manifest, precision: str, half: Half, index: int) -> EngineCache:
        """For a graph on this machine; BackendError without TensorRT or a GPU."""
        import onnxruntime

        graph = manifest.graph(precision, half)
        identity = EngineIdentity(
            graph.sha256,
            precision,
            Profile.of(manifest, precision, half),
            tensorrt_version(),
            onnxruntime.__version__,
            gpu_architecture(index),
        )
        return cls(manifest.folder / FOLDER, Path(graph.file).stem, identity, index)

    def open(self, open_with: Callable[[dict[str, Any]], Session]) -> Session:
        """What ``open_with`` makes of the provider's options, with engines built where needed.

        Engines are reused only if their record vouches for them, and built again if they then fail.
        Other processes wait meanwhile.
        """
        options = provider_options(self.folder, self.identity.profile, self._index)
        with self._locked():
            if self.is_trusted():
                try:
                    return open_with(options)
                except Exception as error:  # ONNX Runtime's have no common type
                    _log.warning(
                        "the TensorRT engine in %s fails and is built again: %s", self.folder, error
                    )
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            _log.warning(
                "building a TensorRT engine in %s, which takes minutes; "
                "fpt export --build-engine does it ahead of time",
                self.folder,
            )
            made = open_with(options)
            self.record()
            return made

    def record(self) -> None:
        """Vouch for the files that are there now."""
        content = {"identity": self._identity_content(), "files": self._files()}
        partial = self.folder / f"{RECORD}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.folder / RECORD)

    def is_trusted(self) -> bool:
        """Whether the record is there, of this identity, and the files are as it says."""
        try:
            content = json.loads((self.folder / RECORD).read_text())
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            _log.warning("the record of %s cannot be read: %s", self.folder, error)
            return False
        expected = {"identity": self._identity_content(), "files": self._files()}
        if content != expected or not expected["files"]:
            _log.warning("the TensorRT engine in %s is not what was recorded", self.folder)
            return False
        return True

    def _identity_content(self) -> Any:
        return json.loads(json.dumps(asdict(self.identity)))  # as JSON gives it back

    def _files(self) -> dict[str, str]:
        return {
            path.name: file_sha256(path)
            for path in sorted(self.folder.iterdir())
            if path.suffix in (".engine", ".profile")  # a timing cache may change at any time
        }

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = self.folder.with_name(f"{self.folder.name}.lock").open("w")
        except OSError as error:  # read only: nobody builds there, so nobody need wait
            if not self.is_trusted():
                raise BackendError(
                    f"no TensorRT engine for this machine is in {self.folder.parent}, and none can "
                    f"be built there: {error}"
                ) from error
            yield
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def build_engine(manifest: Manifest, precision: str, half: Half, index: int = 0) -> None:
    """Build the engine of a graph, unless a trusted one is there; BackendError when it cannot be.

    In a process of its own: the builder holds Python's lock for minutes.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_build_engine, manifest, precision, half, index).result()


def _build_engine(manifest: Manifest, precision: str, half: Half, index: int) -> None:
    from fpt_model.onnx_engine import open_session

    open_session(manifest, precision, half, ("tensorrt", "cuda", "cpu"), index, strict=True)


def tensorrt_version() -> str:
    """Of all that are installed, one of which ONNX Runtime loads; BackendError without any."""
    tried = [f"libnvinfer.so.{major}" for major in _TENSORRT_MAJORS]
    found = []
    for name in tried:
        with contextlib.suppress(OSError, AttributeError):
            found.append(f"{name} {ctypes.CDLL(name).getInferLibVersion()}")
    if not found:
        raise BackendError(f"TensorRT is not installed: none of {', '.join(tried)} can be loaded")
    return ", ".join(found)


def gpu_architecture(index: int) -> str:
    """Name and compute capability of a GPU from the CUDA driver; BackendError without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"there is no CUDA driver: {error}") from error
    device, name = ctypes.c_int(), ctypes.create_string_buffer(100)
    version = [ctypes.c_int(), ctypes.c_int()]
    calls = [
        (cuda.cuInit, (0,)),
        (cuda.cuDeviceGet, (ctypes.byref(device), index)),
        (cuda.cuDeviceGetName, (name, len(name))),
        (cuda.cuDeviceGetAttribute, (ctypes.byref(version[0]), _CUDA_MAJOR_ATTRIBUTE)),
        (cuda.cuDeviceGetAttribute, (ctypes.byref(version[1]), _CUDA_MINOR_ATTRIBUTE)),
    ]
    for i, (call, arguments) in enumerate(calls):
        code = call(*arguments) if i < 2 else call(*arguments, device)
        if code:
            raise BackendError(f"the CUDA driver gives error {code} for GPU {index}")
    return f"{name.value.decode()} {version[0].value}.{version[1].value}"
