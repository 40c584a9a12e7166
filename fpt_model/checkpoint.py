# SPDX-License-Identifier: MIT
"""Loading and saving models. Checkpoint files are untrusted: no pickled code is ever run."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
# of its tensors those that are never applied, or constants
_UNUSED = (".cross_out.weight", "pos_emb.freqs", "input_mlp.coeffs", "mask_token")
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
    path = Path(model).expanduser()
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
    if _can_map(path):
        state = _MappedFile(path, partial(_open_published, path, mmap=True))
    else:
        state = _open_published(path, mmap=False)
    return from_reference(state, FPT_BASE, dtype)


def _can_map(path: Path) -> bool:
    """Zip archives, what torch writes today; torch would take compressed bytes for weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return False


def _open_published(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types for damaged or hostile files
        raise CheckpointError(
            f"{path} is not a readable weights-only checkpoint: {error}"
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
    except (ValueError, TypeError, RecursionError) as error:
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

    Raises ValueError for a model that an engine converted in place: some weights are gone.
    """
    refuse_prepared(model)
    path = Path(path)
    state = {
        k: (v.to(dtype) if v.is_floating_point() else v).contiguous()
        for k, v in model.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(state, partial, {_CONFIG_KEY: json.dumps(model.config.to_dict())})
        partial.chmod(0o644)  # safetensors makes files that only their owner can read
        partial.replace(path)
    except BaseException:  # also SIGTERM's SystemExit
        partial.unlink(missing_ok=True)
        raise


def from_reference(
    state_dict: Mapping[str, Any], config: FPTConfig, dtype: torch.dtype = torch.float32
) -> FlowPokeTransformer:
    """:meth:`FlowPokeTransformer.from_reference`; ``dtype`` as in :func:`load_model`.

    Its DINOv2 position table is resampled once, here, to the configuration's token grid (bicubic,
    antialiased). Tensors that its forward pass never uses are dropped.
    """
    origin = "the reference state dict"

    def tensor(name: str, dims: int | None = None) -> Tensor:
        value = state_dict[name]
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{origin}: {name!r} is no tensor, received {type(value)}")
        if dims is not None and value.ndim != dims:
            raise CheckpointError(
                f"{origin}: tensor {name!r} has shape {list(value.shape)}, expected {dims} "
                "dimensions"
            )
        return value

    strange = [name for name in state_dict if not isinstance(name, str)]
    if strange:
        raise CheckpointError(f"{origin}: {strange[0]!r} is no name of a tensor")
    names = {_own_name(name): name for name in state_dict if not name.endswith(_UNUSED)}
    made: dict[str, Callable[[], Tensor]] = {
        own: partial(tensor, name) for own, name in names.items()
    }
    if _QUERY in names:
        made[_QUERY] = lambda: tensor(names[_QUERY], 3).flatten()
    if _POSITIONS in names and _CLASS_TOKEN in names:
        table, token = (tensor(names[name], 3) for name in (_POSITIONS, _CLASS_TOKEN))
        side = math.isqrt(table.shape[1] - 1) if table.shape[1] else 0
        if side**2 + 1 != table.shape[1] or table.shape[2] != token.shape[2] or not side:
            raise CheckpointError(
                f"{origin}: tensor {_reference_name(_POSITIONS)!r} has shape "
                f"{list(table.shape)}, expected [1, 1 + n * n, {token.shape[2]}]"
            )
        # timm's model with registers has no position for the class token: it is added to the token
        made[_CLASS_TOKEN] = lambda: token + table[:, :1]
        made[_POSITIONS] = lambda: _resample_positions(table[:, 1:], config.image_size // _PATCH)
    return _build(config, made, origin, _reference_name, dtype)


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
    square = table.unflatten(1, (n, n)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(
        square, (side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def _build(
    config: FPTConfig,
    made: Mapping[str, Callable[[], Tensor]],
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
            raise CheckpointError(f"{name} {list(tensor.shape)} is missing")
        value = made[key]()
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {list(value.shape)}, expected {list(tensor.shape)}"
            )
        if value.layout != torch.strided or value.is_meta or not _same_kind(value, tensor):
            raise CheckpointError(
                f"{name} is {value.dtype}, {value.layout} on {value.device}, expected numbers "
                f"to convert to {tensor.dtype}"
            )
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} has values that are not finite")
        own[key] = value.to(types.get(key, tensor.dtype), copy=True)
    for key in made:
        if key not in expected:
            found = f"{name_of(key)!r} {list(made[key]().shape)}"
            raise CheckpointError(f"{origin}: unexpected tensor {found}")
    model.load_state_dict(own, assign=True)
    return model.eval()


def _same_kind(value: Tensor, expected: Tensor) -> bool:
    types = _FLOATS if expected.is_floating_point() else (expected.dtype,)
    return value.dtype in types


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
