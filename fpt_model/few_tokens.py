# SPDX-License-Identifier: MIT
"""The layers of a prepared model for a few tokens on the CPU: one call into C++, not hundreds.

The C++ is few_tokens.cpp beside this file, built for this processor when first needed (seconds) and
kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpt_model.layers import Rotation
from fpt_model.model import FlowPokeTransformer, KeyValue

MOST_TOKENS = 16
"""With more, the products are no longer bound by reading the weights."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
# strict as to the order of sums and to infinities, not as to errno and traps
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast"


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed; the message has its first words."""


def compiler() -> str:
    """The command of the C++ compiler, which torch.compile calls, too."""
    return os.environ.get("CXX") or "g++"


def cache_folder() -> Path:
    """Where built code is kept: ``fpt_model`` in the user's cache folder (XDG)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fpt_model"


def _build(folder: Path, defines: Sequence[str], openmp: Sequence[str]) -> Path:
    """The library in ``folder``; BuildError."""
    unit, built = folder / "few_tokens.o", folder / "few_tokens.so"
    flags = [*_FLAGS.split(), "-fopenmp", "-fPIC", *defines]
    for arguments in (
        [*flags, "-c", str(_SOURCE), "-o", str(unit)],
        ["-shared", "-Wl,-z,defs", str(unit), *openmp, "-o", str(built)],
    ):
        done = subprocess.run(
            [*shlex.split(compiler()), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            words = next((line for line in done.stderr.splitlines() if "error" in line), "")
            words = words or done.stderr.strip()[:200]
            raise BuildError(f"{compiler()} failed with {done.returncode}: {words}")
    return built


def _processor() -> str:
    """What code of ``-march=native`` depends on; homes may be shared by several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(kinds)})) + platform.machine()


def _loaded(library: Path) -> Any:
    function = ctypes.CDLL(str(library)).run_layers
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 6
    return function


_building = threading.Lock()


@cache
def _library(head_dim: int, dtype: torch.dtype) -> Any:
    """The function ``run_layers`` for heads and weights of one kind; BuildError."""
    # the OpenMP that torch has loaded: threads of a second one would compete with its threads
    package = Path(torch.__file__).parent  # wheels of x86-64 and of Arm
    places = (package / "lib", package.with_name("torch.libs"))
    bundled = sorted(file for place in places for file in place.glob("libgomp*.so*"))
    openmp = [str(bundled[0])] if bundled else ["-lgomp"]
    defines = [f"-DHEAD_DIM={head_dim}", f"-DWEIGHT={_TYPES[dtype]}"]
    defines.append(f"-DMOST_TOKENS={MOST_TOKENS}")
    try:
        what = [_SOURCE.read_text(), _FLAGS, compiler(), *openmp, *defines, _processor()]
        digest = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
        with _building:
            return _kept(f"few_tokens-{digest}.so", defines, openmp)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the user's home
        raise BuildError(str(error)) from error


def _kept(name: str, defines: Sequence[str], openmp: Sequence[str]) -> Any:
    """Out of the cache; built if it is not there, or is damaged."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = folder.is_dir() and _is_own(folder)
    if own:
        with suppress(OSError, AttributeError):
            return _loaded(folder / name)
    kept = own and os.access(folder, os.W_OK)
    # otherwise it is built in each process, where nobody else can put anything
    with tempfile.TemporaryDirectory(dir=folder if kept else None) as private:
        built = _build(Path(private), defines, openmp)
        return _loaded(built.replace(folder / name) if kept else built)


def _is_own(folder: Path) -> bool:
    """Whether it is this user's or root's, and not everybody can put code there."""
    status = folder.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o002


class FewTokens:
    """Stands in for :meth:`FlowPokeTransformer.run_layers` of one prepared model.

    Hands on to it what it cannot do: more tokens than `MOST_TOKENS`, several images, queries that
    see a part of the pokes. Sums are in float32, also between bfloat16's products. A deep copy of
    the model goes on using the weights of the first. BuildError where the C++ cannot be built,
    ValueError for a model that it is not made for.
    """

    def __init__(self, model: FlowPokeTransformer) -> None:
        config, dtype = model.config, model.layers[0].self_qkv.weight.dtype
        if config.head_dim % 32 or dtype not in _TYPES:
            raise ValueError(
                "expected heads of a multiple of 32 channels and weights of "
                f"{[str(t) for t in _TYPES]}, received {config.head_dim} and {dtype}"
            )
        self._otherwise = model.run_layers
        self._heads, self._head_dim, self._dtype = config.heads, config.head_dim, dtype
        self._hidden = config.width * config.ffn_expand
        self.weights: list[nn.Linear] = []  # what must stay as it is
        self._tensors = []
        for layer in model.layers:
            own = [layer.self_qkv, layer.self_out, layer.cross_q, layer.ffn_up, layer.ffn_down]
            norms = layer.self_norm, layer.cross_norm, layer.ffn_norm  # folded, with a buffer each
            scales = [norm.get_buffer("scales") for norm in norms]
            scales += [layer.self_scale, layer.cross_scale]
            self.weights += own
            self._tensors.append(
                [t.detach().float().contiguous() for t in scales]
                + [linear.weight.detach().contiguous() for linear in own]
            )
        self._pointers = np.zeros((len(model.layers), len(self._tensors[0]) + 4), np.uint64)
        self._pointers[:, :-4] = [[t.data_ptr() for t in own] for own in self._tensors]
        self._function = _library(config.head_dim, dtype)

    def __deepcopy__(self, memo: Any) -> FewTokens:
        return self  # nothing of it changes, and it keeps its weights

    def __call__(
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
        """:meth:`FlowPokeTransformer.run_layers`."""
        batch, tokens = x.shape[:2]
        images, _, image_tokens, _ = memory[0][0].shape
        if not 0 < batch * tokens <= MOST_TOKENS or images > 1 or hidden is not None:
            return self._otherwise(x, pokes, rotation, cond, memory, past, known, hidden)
        for own in memory:
            self._check_memory(own, image_tokens)
        kept = [self._with_place(own, batch, known, pokes) for own in past]
        pointers = self._pointers.copy()
        pointers[:, -4:] = [
            [t.data_ptr() for t in (*image, *own)] for image, own in zip(memory, kept, strict=True)
        ]
        shape = [len(kept), batch, tokens, pokes, known, kept[0][0].shape[2], self._heads]
        shape += [image_tokens, self._hidden, torch.get_num_threads()]
        sizes = np.array(shape, np.int64)
        x = x.to(torch.float32, copy=True).contiguous()  # is written to
        inputs = [t.contiguous() for t in (*rotation, cond)] + [x]
        self._function(sizes.ctypes.data, pointers.ctypes.data, *(t.data_ptr() for t in inputs))
        return x, kept

    def _check_memory(self, memory: KeyValue, image_tokens: int) -> None:
        """C++ is told where it lies, and nothing else."""
        expected = 1, self._heads, image_tokens, self._head_dim
        for t in memory:
            if t.shape != expected or t.dtype != self._dtype or not t.is_contiguous() or t.is_cuda:
                raise ValueError(
                    f"expected contiguous keys and values {list(expected)} of the image in "
                    f"{self._dtype}, received {list(t.shape)}, strides {t.stride()}, in {t.dtype} "
                    f"on {t.device}"
                )

    def _with_place(
        self, past: KeyValue | tuple[None, None], batch: int, known: int, pokes: int
    ) -> KeyValue:
        """Keys and values of known pokes, and room for the new ones: ``past`` itself if it has."""
        k, v = past
        if k is None or v is None:
            k = v = torch.empty(batch, self._heads, 0, self._head_dim, dtype=self._dtype)
        expected = batch, self._heads, max(known, k.shape[2]), self._head_dim
        if k.shape != expected or v.shape != expected or not k.dtype == v.dtype == self._dtype:
            raise ValueError(
                f"expected a context of {known} pokes for {batch} rows in {self._dtype}, "
                f"received keys {list(k.shape)} in {k.dtype}"
            )
        if k.shape[2] < known + pokes:
            k, v = (functional.pad(t[:, :, :known], (0, 0, 0, pokes)) for t in (k, v))
        return k.contiguous(), v.contiguous()
