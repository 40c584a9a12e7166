# SPDX-License-Identifier: MIT
"""Loading and saving models. Checkpoint files are untrusted: no pickled code is ever run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fpt_model.config import FPT_BASE, FPTConfig
from fpt_model.model import FlowPokeTransformer

_CONFIG_KEY = "fpt_config"


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


def load_model(model: str | os.PathLike[str]) -> FlowPokeTransformer:
    """Load a shipped model by name, a ``.safetensors`` file, or the published FPT ``.pt`` file.

    The published weights (``flow_poke_open_set_base.pt``) are licensed CC BY-NC 4.0 by their
    authors: not for commercial use. The model is in eval mode, float32, on the CPU.

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        CheckpointError: the file is damaged or does not fit; names the first wrong tensor.
    """
    path = resolve_model(model)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or hostile files
        raise CheckpointError(
            f"{path} is not a readable weights-only checkpoint: {error}"
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f'{path} must hold a dict with the state dict under "model"')
    return from_reference(state, FPT_BASE)


def _load_safetensors(path: Path) -> FlowPokeTransformer:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if _CONFIG_KEY not in metadata:
        raise CheckpointError(f"{path} has no {_CONFIG_KEY!r} in its metadata, is it an FPT model?")
    try:
        config = FPTConfig.from_dict(json.loads(metadata[_CONFIG_KEY]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has an unusable configuration: {error}") from error
    return _build(config, state, str(path))


def save_model(
    model: FlowPokeTransformer, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights (as ``dtype``) and configuration to one safetensors file, atomically."""
    path = Path(path)
    state = {
        k: (v.to(dtype) if v.is_floating_point() else v).contiguous()
        for k, v in model.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, {_CONFIG_KEY: json.dumps(model.config.to_dict())})
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    partial.replace(path)


def from_reference(state_dict: Mapping[str, Tensor], config: FPTConfig) -> FlowPokeTransformer:
    """Build a model from the state dict of the public FPT implementation.

    Its DINOv2 position table is resampled once, here, to the configuration's token grid (bicubic,
    antialiased). Tensors that its forward pass never uses are dropped. Raises CheckpointError.
    """
    return _build(config, convert_reference(state_dict, config), "the reference state dict")


def convert_reference(state_dict: Mapping[str, Tensor], config: FPTConfig) -> dict[str, Tensor]:
    """The reference's tensors under this package's names."""
    image = "image_embedder.model."
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith((".cross_out.weight", "pos_emb.freqs", "input_mlp.coeffs", "mask_token")):
            continue  # never applied, or constants
        if key.startswith(image):
            out[
                "encoder.backbone."
                + key.removeprefix(image).replace("register_tokens", "reg_token")
            ] = value
        elif key == "input_mlp.query_token":
            out["embed.query_token"] = value.flatten()
        elif key == "input_mlp.mlp.0.weight":
            out["embed.project.weight"] = value
        elif key.startswith("input_mlp.mlp."):
            block, rest = key.removeprefix("input_mlp.mlp.").split(".", 1)
            out[f"embed.blocks.{int(block) - 1}.{rest}"] = value
        elif key.startswith("transformer."):
            out[key.removeprefix("transformer.")] = value
        elif key.startswith("out_mlp."):
            out["head." + key.removeprefix("out_mlp.")] = value
        else:
            out[key] = value

    table = out.get("encoder.backbone.pos_embed")
    cls_token = out.get("encoder.backbone.cls_token")
    if table is not None and cls_token is not None:
        # timm's model with registers has no position for the class token: it is added to the token
        out["encoder.backbone.cls_token"] = cls_token + table[:, :1]
        patch = out["encoder.backbone.patch_embed.proj.weight"].shape[-1]
        out["encoder.backbone.pos_embed"] = _resample_positions(
            table[:, 1:], config.image_size // patch
        )
    return out


def _resample_positions(table: Tensor, side: int) -> Tensor:
    """``[1, n * n, C]`` to ``[1, side * side, C]``."""
    n = round(table.shape[1] ** 0.5)
    square = table.unflatten(1, (n, n)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(
        square, (side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def _build(config: FPTConfig, state: Mapping[str, Tensor], origin: str) -> FlowPokeTransformer:
    """Instantiate and load strictly; CheckpointError names the first misfit."""
    try:
        model = FlowPokeTransformer(config)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: cannot build {config.encoder!r}: {error}") from error
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            raise CheckpointError(f"{origin}: tensor {key!r} {list(tensor.shape)} is missing")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: tensor {key!r} has shape {list(state[key].shape)}, "
                f"expected {list(tensor.shape)}"
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{origin}: tensor {key!r} has values that are not finite")
    for key in state:
        if key not in expected:
            raise CheckpointError(f"{origin}: unexpected tensor {key!r} {list(state[key].shape)}")
    model.load_state_dict(dict(state))
    return model.eval()
