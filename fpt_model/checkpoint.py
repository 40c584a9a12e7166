# SPDX-License-Identifier: MIT
"""Loading and saving models. Checkpoint files are untrusted: no pickled code is ever run."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fpt_model.allocator import blocks_apart
from fpt_model.config import FPT_BASE, FPTConfig
from fpt_model.engine import refuse_prepared, weight_types
from fpt_model.model import FlowPokeTransformer

_CONFIG_KEY = "fpt_config"

# what names of tensors begin with: the public implementation's, and ours
_PREFIXES = (
    ("image_embedder.model.register_tokens", "encoder.backbone.reg_token"),
    ("image_embedder.model.", "encoder.backbone."),
    ("input_mlp.query_token", "embed.query_token"),
    ("input_mlp.mlp.0.", "embed.project."),
    ("input_mlp.mlp.1.", "embed.blocks.0."),
    ("input_mlp.mlp.2.", "embed.blocks.1."),
    ("transformer.layers.", "layers."),
    ("out_mlp.", "head."),
)
# of its tensors those that are never applied
_UNUSED = re.compile(
    r"transformer\.layers\.\d+\.cross_out\.weight|image_embedder\.model\.mask_token"
)
# and the constants, which ours computes
_CONSTANTS = {"transformer.pos_emb.freqs": "rope.freqs", "input_mlp.coeffs": "embed.coeffs"}
_ROUNDING = 5e-3  # relative, of what may be stored in bfloat16
_UNUSED_PARAMETERS = 5000  # at most, that timm makes and features_only then leaves out
_QUERY = "embed.query_token"
_POSITIONS = "encoder.backbone.pos_embed"
_CLASS_TOKEN = "encoder.backbone.cls_token"
_PATCH = 14  # px, of the reference's DINOv2
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message says what is wrong with it."""


def shipped_model_folders() -> list[Path]:
    """Folders that are searched for shipped models: the source tree, then installed prefixes."""
    prefixes = [sys.prefix, *os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)]
    installed = [Path(p) / "share" / "fpt_ros" / "models" for p in prefixes if p]
    return [Path(__file__).resolve().parent.parent / "models", *installed]


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """The file of a shipped model's name or of a path; FileNotFoundError says what was tried."""
    path = Path(model)
    with suppress(RuntimeError):  # ~ of a user who is not there
        path = path.expanduser()
    if path.is_file():
        return path
    folders = shipped_model_folders()
    for folder in folders:
        candidate = folder / f"{model}.safetensors"
        if candidate.is_file():
            return candidate
    names = sorted({p.stem for folder in folders for p in folder.glob("*.safetensors")})
    raise FileNotFoundError(
        f"no model {str(model)!r}: it is neither a file nor one of the shipped models {names}"
    )


@blocks_apart()
def load_model(
    model: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> FlowPokeTransformer:
    """Load a shipped model by name, a ``.safetensors`` file, or the published FPT ``.pt`` file.

    The published weights (``flow_poke_open_set_base.pt``) are licensed CC BY-NC 4.0 by their
    authors: not for commercial use. The model is in eval mode, on the CPU, and does not depend on
    the file any more.

    Args:
        dtype: of those weights that an engine of this precision converts; all others, and by
            default all, are float32. For :meth:`FlowPredictor.load`, which needs little more memory
            than the weights then take.

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        CheckpointError: the file is damaged or does not fit; names the first wrong tensor.
    """
    path = resolve_model(model)
    if path.suffix == ".safetensors":
        return _load_safetensors(path, dtype)
    state: Mapping[str, Any]
    if _is_archive(path):
        state = _MappedFile(path, partial(_open_published, path, mmap=True))
    else:
        state = _open_published(path, mmap=False)
    return from_reference(state, FPT_BASE, dtype, str(path))


def _is_archive(path: Path) -> bool:
    """Whether it is a zip archive, what torch writes today; CheckpointError for one not to be used.

    torch neither compares checksums nor bounds what it inflates.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path}: its part {part.filename!r} is compressed, expected all stored "
                        "as they are, as torch writes them"
                    )
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many types for damaged or hostile files
        raise CheckpointError(f"{path} is not a readable archive: {error!r}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged!r} is another")
    return True


def _open_published(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types for damaged or hostile files
        # torch hides its reason behind advice on how to run the file's code all the same
        hidden = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        text = str(hidden or error).strip() or repr(hidden or error)
        reason = text.splitlines()[0].partition(" Please use `torch.")[0]
        raise CheckpointError(
            f"{path} is not a readable weights-only checkpoint: {reason}"
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f'{path} must hold a dict with the state dict under "model"')
    return state


def _load_safetensors(path: Path, dtype: torch.dtype) -> FlowPokeTransformer:
    state = _MappedFile(path, partial(_Safetensors, path))
    metadata = state.content.metadata
    if _CONFIG_KEY not in metadata:
        raise CheckpointError(f"{path} has no {_CONFIG_KEY!r} in its metadata, is it an FPT model?")
    try:
        config = FPTConfig.from_dict(json.loads(metadata[_CONFIG_KEY]))
        # timm's encoders call theirs by three names
        depths = {"depth": config.depth, "context_depth": config.context_depth} | {
            f"encoder_kwargs.{name}": np.sum(config.encoder_kwargs.get(name, 0), dtype=float)
            for name in ("depth", "depths", "layers")
        }
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unusable configuration: {error}") from error
    made = {name: partial(state.__getitem__, name) for name in state}
    # before as many layers are built as it says
    for name, depth in depths.items():
        if depth > len(made):
            raise CheckpointError(f"{path} has {name} {depth:.0f}, but only {len(made)} tensors")
    return _build(config, made, str(path), dtype=dtype)


class _Safetensors(Mapping[str, Tensor]):
    """A safetensors file; CheckpointError if it is none."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


_Content = TypeVar("_Content", bound=Mapping[Any, Any])


class _MappedFile(Mapping[str, Any], Generic[_Content]):
    """Tensors of a file that is mapped into memory, where each page that was read stays.

    So the file is opened anew, by ``open``, whenever much of it was read. CheckpointError for a
    tensor that cannot be read, and if the file is another by then.
    """

    _LIMIT = 2**24  # bytes

    def __init__(self, path: Path, open: Callable[[], _Content]) -> None:
        self._path, self._open, self._first = path, open, _identity(path)
        self.content = self._opened()
        self._names = list(self.content)

    def _opened(self) -> _Content:
        content, self._seen = self._open(), 0
        if _identity(self._path) != self._first:
            raise CheckpointError(f"{self._path} was changed while it was read")
        return content

    def __getitem__(self, name: str) -> Any:
        try:
            if self._seen > self._LIMIT:
                del self.content
                self.content = self._opened()
            value = self.content[name]
            self._seen += value.nbytes if isinstance(value, Tensor) else 0
        except CheckpointError:
            raise
        except Exception as error:  # of many types, as the formats have many kinds of tensors
            raise CheckpointError(
                f"{self._path}: tensor {name!r} cannot be read: {error}"
            ) from error
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Of a file: another if it is replaced or written."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} is not readable: {error}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def save_model(
    model: FlowPokeTransformer, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights (as ``dtype``) and configuration to one safetensors file, atomically.

    Raises OSError, and ValueError for a model that an engine converted in place, of which some
    weights are gone, or with a weight that is not finite in ``dtype``.
    """
    refuse_prepared(model)
    path = Path(path)
    state = {
        k: (v.to(dtype) if v.is_floating_point() else v).contiguous()
        for k, v in model.state_dict().items()
    }
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"tensor {name!r} has values that are not finite in {dtype}")
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(state, partial, {_CONFIG_KEY: json.dumps(model.config.to_dict())})
        partial.chmod(0o644)  # safetensors makes files that only their owner can read
        partial.replace(path)
    except BaseException as error:  # also SIGTERM's SystemExit
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def from_reference(
    state_dict: Mapping[str, Any],
    config: FPTConfig,
    dtype: torch.dtype = torch.float32,
    origin: str = "the reference state dict",
) -> FlowPokeTransformer:
    """:meth:`FlowPokeTransformer.from_reference`; ``dtype`` as in :func:`load_model`.

    Its DINOv2 position table is resampled once, here, to the configuration's token grid (bicubic,
    antialiased). Tensors that its forward pass never uses are dropped, constants compared with our
    formulas. ``origin`` is what messages call the state dict.
    """

    def tensor(own: str, expected: str, fits: Callable[[Tensor], bool]) -> Tensor:
        """One that ours is computed from: finite, and of the shape that is ``expected``."""
        what = f"{origin}: tensor {names[own]!r}"
        value = _numbers(state_dict[names[own]], what, _FLOATS)
        if value.ndim != 3 or not fits(value):
            raise CheckpointError(f"{what} has shape {list(value.shape)}, expected {expected}")
        _check_finite(value, what)
        return value.to("cpu", torch.float32)

    def is_token(value: Tensor) -> bool:
        return value.shape[:2] == (1, 1)

    def is_table(value: Tensor) -> bool:
        side = math.isqrt(max(value.shape[1] - 1, 0))
        return side > 0 and value.shape == (1, 1 + side**2, token.shape[2])

    names: dict[str, str] = {}
    for name in state_dict:
        if not isinstance(name, str):
            raise CheckpointError(f"{origin}: {name!r} is no name of a tensor")
        own = _own_name(name)
        if _reference_name(own) != name:  # ours, which another one may be meant for
            raise CheckpointError(f"{origin}: unexpected tensor {name!r}")
        if not _UNUSED.fullmatch(name) and name not in _CONSTANTS:
            names[own] = name
    made: dict[str, Callable[[], Any]] = {
        own: partial(state_dict.__getitem__, name) for own, name in names.items()
    }
    if _QUERY in names:
        made[_QUERY] = lambda: tensor(_QUERY, "[1, 1, C]", is_token).flatten()
    if _POSITIONS in names and _CLASS_TOKEN in names:
        token = tensor(_CLASS_TOKEN, "[1, 1, C]", is_token)
        table = tensor(_POSITIONS, f"[1, 1 + n * n, {token.shape[2]}]", is_table)
        # timm's model with registers has no position for the class token: it is added to the token
        made[_CLASS_TOKEN] = lambda: token + table[:, :1]
        made[_POSITIONS] = lambda: _resample_positions(table[:, 1:], config.image_size // _PATCH)
    model = _build(config, made, origin, _reference_name, dtype)
    for name, own in _CONSTANTS.items():
        if name in state_dict:
            _check_constant(state_dict[name], model.get_buffer(own), f"{origin}: tensor {name!r}")
    return model


def _check_constant(value: Any, ours: Tensor, name: str) -> None:
    """``value`` may have further axes before ours, along which nothing changes."""
    theirs = _numbers(value, name, _FLOATS).to("cpu", ours.dtype)
    if theirs.shape[-ours.ndim :] != ours.shape or not torch.allclose(
        theirs, ours.expand_as(theirs), rtol=_ROUNDING
    ):
        raise CheckpointError(
            f"{name} {list(theirs.shape)} differs from the formula that it stands for, "
            f"{list(ours.shape)}"
        )


def _own_name(reference: str) -> str:
    for theirs, ours in _PREFIXES:
        if reference.startswith(theirs):
            return ours + reference.removeprefix(theirs)
    return reference


def _reference_name(own: str) -> str:
    for theirs, ours in _PREFIXES:
        if own.startswith(ours):
            return theirs + own.removeprefix(ours)
    return own


def _resample_positions(table: Tensor, side: int) -> Tensor:
    """``[1, n * n, C]`` to ``[1, side * side, C]``."""
    n = round(table.shape[1] ** 0.5)
    square = table.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    resized = F.interpolate(
        square, (side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def _build(
    config: FPTConfig,
    made: Mapping[str, Callable[[], Any]],
    origin: str,
    name_of: Callable[[str], str] = str,
    dtype: torch.dtype = torch.float32,
) -> FlowPokeTransformer:
    """A model of copies of the tensors that are ``made``; CheckpointError names the first misfit.

    ``name_of`` gives the name in ``origin`` of a tensor of ours; ``dtype`` as in
    :func:`load_model`.
    """
    try:
        with _parameters_without_memory(len(made) + _UNUSED_PARAMETERS):
            model = FlowPokeTransformer(config)
    except Exception as error:  # timm's, of whatever the configuration says, are of many types
        raise CheckpointError(f"{origin}: cannot build {config.encoder!r}: {error!r}") from error
    expected, types, own = model.state_dict(), weight_types(model, dtype), {}
    for key, tensor in expected.items():
        name = f"{origin}: tensor {name_of(key)!r}"
        if key not in made:
            other = next((f", but {name_of(k)!r} is there" for k in made if k not in expected), "")
            raise CheckpointError(f"{name} {list(tensor.shape)} is missing{other}")
        value = _numbers(
            made[key](), name, _FLOATS if tensor.is_floating_point() else (tensor.dtype,)
        )
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {list(value.shape)}, expected {list(tensor.shape)}"
            )
        own[key] = value.to("cpu", types.get(key, tensor.dtype), copy=True)
        _check_finite(own[key], name)  # after it was converted, which may be to less range
    for key in made:
        if key not in expected:
            found = f"{name_of(key)!r} {list(getattr(made[key](), 'shape', ()))}"
            raise CheckpointError(f"{origin}: unexpected tensor {found}")
    model.load_state_dict(own, assign=True)
    return model.eval()


def _numbers(value: Any, name: str, types: Collection[torch.dtype]) -> Tensor:
    """``value``, if it is a tensor that stores numbers of these types; else CheckpointError."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name} is no tensor, received {type(value)}")
    if (
        value.is_nested
        or value.layout != torch.strided
        or value.is_meta
        or value.dtype not in types
        # a few bytes may claim to be any number of values
        or value.untyped_storage().nbytes() < value.nbytes
    ):
        raise CheckpointError(
            f"{name} is {value.dtype}, {value.layout} on {value.device}, expected numbers in one "
            f"of {[str(t) for t in types]}, each of them stored"
        )
    return value


def _check_finite(value: Tensor, name: str) -> None:
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{name} has values that are not finite")


@contextmanager
def _parameters_without_memory(most: int) -> Iterator[None]:
    """Modules made meanwhile, in this thread, get parameters on the device "meta".

    A model of a gigabyte is then loaded in one, and nothing is drawn only to be replaced. Buffers
    are as ever: some are constants that no checkpoint has. ValueError for more than ``most``
    parameters: a configuration may ask for any number.
    """
    thread, count = threading.get_ident(), 0

    def strip(_: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return parameter
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"it would have more than {most} parameters")
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(strip)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
