# SPDX-License-Identifier: MIT
"""C++ of our own, built for this processor when first needed (seconds) and kept in the user's cache
folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fpt_model import processor

_FOLDER = Path(__file__).parent
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
# strict as to the order of sums and to infinities, not as to errno and traps
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast"


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed; the message has its first words."""


def compiler() -> list[str]:
    """The words of the C++ compiler's command; BuildError for a ``CXX`` that is none.

    torch.compile calls it, too, but takes all of ``CXX`` for one word.
    """
    given = os.environ.get("CXX") or "g++"
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX must be a command, received {given!r}: {error}") from error
    if not words:
        raise BuildError(f"CXX must be a command, received {given!r}")
    return words


def cache_folder() -> Path:
    """Where built code is kept: ``fpt_model`` in the user's cache folder (XDG)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fpt_model"


_building = threading.Lock()


@cache
def function(name: str, symbol: str, head_dim: int, dtype: torch.dtype, *defines: str) -> Any:
    """``symbol`` of ``name``.cpp for heads of so many channels and arrays of ``dtype``, without a
    return value; the caller declares its arguments. BuildError."""
    # the OpenMP that torch has loaded: threads of a second one would compete with its threads
    package = Path(torch.__file__).parent  # wheels of x86-64 and of Arm
    places = (package / "lib", package.with_name("torch.libs"))
    bundled = sorted(file for place in places for file in place.glob("libgomp*.so*"))
    openmp = [str(bundled[0])] if bundled else ["-lgomp"]
    source = _FOLDER / f"{name}.cpp"
    flags = [f"-DHEAD_DIM={head_dim}", f"-DWEIGHT={TYPES[dtype]}", *defines]
    try:
        headers = [header.read_text() for header in sorted(_FOLDER.glob("*.h"))]
        what = [source.read_text(), *headers, _FLAGS, *compiler(), *openmp, *flags]
        what.append(processor.description())
        digest = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
        with _building:
            return _kept(source, symbol, f"{name}-{digest}.so", flags, openmp)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the user's home
        raise BuildError(str(error)) from error


def _kept(
    source: Path, symbol: str, name: str, defines: Sequence[str], openmp: Sequence[str]
) -> Any:
    """Out of the cache; built if it is not there, or is damaged."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = folder.is_dir() and _is_own(folder)
    if own:
        with suppress(OSError, AttributeError):
            if _is_whole(folder / name):
                return _loaded(folder / name, symbol)
    kept = own and os.access(folder, os.W_OK)
    # otherwise it is built in each process, where nobody else can put anything
    with tempfile.TemporaryDirectory(dir=folder if kept else None) as private:
        built = _build(source, Path(private), defines, openmp)
        with built.open("ab") as library:
            library.write(_checksum(built.read_bytes()))
        return _loaded(built.replace(folder / name) if kept else built, symbol)


def _is_own(folder: Path) -> bool:
    """Whether it is this user's or root's, and nobody else can put code there."""
    status = folder.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_whole(library: Path) -> bool:
    """Whether it ends with its checksum; loading a part of one would end the process."""
    content = library.read_bytes()
    length = len(content) - hashlib.sha256().digest_size
    return length > 0 and _checksum(content[:length]) == content[length:]


def _build(source: Path, folder: Path, defines: Sequence[str], openmp: Sequence[str]) -> Path:
    """The library in ``folder``; BuildError."""
    unit, built = folder / f"{source.stem}.o", folder / f"{source.stem}.so"
    flags = [*_FLAGS.split(), "-fopenmp", "-fPIC", *defines]
    for arguments in (
        [*flags, "-c", str(source), "-o", str(unit)],
        ["-shared", "-Wl,-z,defs", str(unit), *openmp, "-o", str(built)],
    ):
        done = subprocess.run(
            [*compiler(), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            words = first_error(done.stderr)
            raise BuildError(f"{shlex.join(compiler())} failed with {done.returncode}: {words}")
    return built


def first_error(output: str) -> str:
    """The line of a compiler's that tells what was wrong, else its first words."""
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), "".join(lines[:1]))


def _loaded(library: Path, symbol: str) -> Any:
    function = getattr(ctypes.CDLL(str(library)), symbol)
    function.restype = None
    return function
