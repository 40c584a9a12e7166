# SPDX-License-Identifier: MIT
"""Configuration of a Flow Poke Transformer: one architecture, different numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fpt_model.geometry import Fit

Head = Literal["reference", "scaled"]

_FORBIDDEN_ENCODER_KWARGS = {
    *("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
}

_LARGEST = 2**16  # of any size; a checkpoint's configuration may ask for all memory


@dataclass(frozen=True)
class FPTConfig:
    """All numbers that define a model. Raises ValueError naming the offending value."""

    name: str = "fpt"
    # --- image encoder -------------------------------------------------------------------------
    encoder: str = "vit_tiny_patch16_224"  # a timm model name
    encoder_kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model
    image_size: int = 128  # px, side of the encoder's square input
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fit: Fit = "crop"  # how a non-square image becomes square, see fpt_model.geometry
    # convolutional encoders see locally: their coarser maps become tokens of a small transformer in
    # which each cell sees the whole image; the finest map only serves what is at a point
    context_width: int = 192  # channels of such a token
    context_depth: int = 2  # transformer blocks
    # channels of a map that carries the context up to the finest of the backbone's maps, for what
    # is at a point; 0: none, and that finest map serves as it is
    detail_width: int = 0
    # --- poke transformer ----------------------------------------------------------------------
    width: int = 192  # channels of a token
    depth: int = 4  # layers
    head_dim: int = 64  # channels of an attention head; a multiple of 4 (2-D axial RoPE)
    ffn_expand: int = 3  # hidden channels of SwiGLU / width
    flow_prescale: float = 0.5  # 1 / image side; flow * prescale goes through tanh before Fourier
    # features at a token's position: grid_sample's align_corners. True reproduces the public
    # implementation (and its half-token shift at the borders); False is exact.
    sample_align_corners: bool = False
    # what tokens and context cells know of their own position besides the rotary embedding, which
    # tells attention where to look but not what was looked at where: bands of a Fourier embedding,
    # see fpt_model.layers.position_features. 0, as in the public implementation: nothing.
    position_bands: int = 0
    # --- head ----------------------------------------------------------------------------------
    flow_dim: int = 2  # 2: (x, y); 3: (x, y, relative depth)
    components: int = 4  # Gaussians of the mixture
    # how raw outputs become the mixture, see fpt_model.model.mixture_parameters: "reference" is
    # that of the public implementation, "scaled" keeps raw outputs near 1, which trains faster
    head: Head = "scaled"
    min_std: float = 1e-4  # image sides, floor of the diagonal of the Cholesky factor
    # --- what the predictions mean -------------------------------------------------------------
    horizon_s: float = 1.0  # s, the fixed time over which the motion is predicted
    # nats, above it a point belongs to the poked part; 1.0 is a placeholder until evaluation
    # chooses one on validation data
    kl_threshold: float = 1.0
    licence: str = "MIT"  # SPDX identifier of the weights

    def __post_init__(self) -> None:
        for name in (
            *("image_size", "context_width", "context_depth", "width", "depth"),
            *("head_dim", "ffn_expand", "components", "position_bands", "detail_width"),
        ):
            value, lowest = getattr(self, name), int(name not in ("position_bands", "detail_width"))
            if not isinstance(value, int) or not lowest <= value <= _LARGEST:
                raise ValueError(
                    f"{name} must be an integer in [{lowest}, {_LARGEST}], received {value!r}"
                )
        if self.flow_dim not in (2, 3):
            raise ValueError(f"flow_dim must be 2 or 3, received {self.flow_dim!r}")
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, received {self.head_dim}")
        if self.width % self.head_dim:
            raise ValueError(
                f"width must be a multiple of head_dim = {self.head_dim}, received {self.width}"
            )
        for name in ("min_std", "horizon_s", "kl_threshold", "flow_prescale"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value <= sys.float_info.max):
                raise ValueError(f"{name} must be a finite number > 0, received {value!r}")
        for name in ("name", "encoder", "licence"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, received {getattr(self, name)!r}")
        if not isinstance(self.sample_align_corners, bool):
            raise ValueError(
                f"sample_align_corners must be a bool, received {self.sample_align_corners!r}"
            )
        if not isinstance(self.encoder_kwargs, dict):
            raise ValueError(f"encoder_kwargs must be a dict, received {self.encoder_kwargs!r}")
        # a checkpoint's configuration is untrusted and reaches timm.create_model
        forbidden = sorted(_FORBIDDEN_ENCODER_KWARGS & self.encoder_kwargs.keys())
        if ":" in self.encoder or forbidden:
            raise ValueError(
                "encoder must be the plain name of a timm model and encoder_kwargs must load "
                f"nothing, received {self.encoder!r} with {forbidden}"
            )
        if self.head not in ("reference", "scaled"):
            raise ValueError(f'head must be "reference" or "scaled", received {self.head!r}')
        if self.fit not in ("crop", "stretch"):
            raise ValueError(f'fit must be "crop" or "stretch", received {self.fit!r}')
        for name, least in (("image_mean", -math.inf), ("image_std", 0.0)):
            value = getattr(self, name)
            if not (
                isinstance(value, tuple | list)
                and len(value) == 3
                and all(isinstance(v, int | float) and least < v < math.inf for v in value)
            ):
                raise ValueError(
                    f"{name} must be three finite numbers > {least:g}, received {value!r}"
                )
            object.__setattr__(self, name, tuple(value))  # lists come from JSON and YAML

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return self.width // self.head_dim

    @property
    def position_dim(self) -> int:
        """Channels of :func:`fpt_model.layers.position_features`."""
        return 2 + 4 * self.position_bands if self.position_bands else 0

    @property
    def raw_dim(self) -> int:
        """Outputs of the head for a token: logits, means and Cholesky entries of all components."""
        d = self.flow_dim
        return self.components * (1 + d + d * (d + 1) // 2)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FPTConfig:
        """Build from a dict; ValueError names keys that are not fields of the configuration."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown configuration keys {unknown}")
        return cls(**values)

    @classmethod
    def from_reference(cls, values: Mapping[str, Any]) -> FPTConfig:
        """Of the public implementation's numbers, by the names that it gives them.

        ``width``, ``depth``, ``d_head``, ``ff_expand``, ``n_components``, ``flow_dim``,
        ``flow_prescale``, ``image_size`` and, of its DINOv2 (patches of 14 px, 4 registers),
        ``dino: {embed_dim, depth, num_heads}``; other keys are not read. ValueError names a
        missing one. The licence is that of the published weights.
        """
        try:
            dino = values["dino"]
            return cls(
                encoder=FPT_BASE.encoder,
                encoder_kwargs={key: dino[key] for key in ("embed_dim", "depth", "num_heads")},
                image_size=values["image_size"],
                fit=FPT_BASE.fit,
                width=values["width"],
                depth=values["depth"],
                head_dim=values["d_head"],
                ffn_expand=values["ff_expand"],
                flow_prescale=values["flow_prescale"],
                sample_align_corners=FPT_BASE.sample_align_corners,
                head=FPT_BASE.head,
                flow_dim=values["flow_dim"],
                components=values["n_components"],
                licence=FPT_BASE.licence,
            )
        except KeyError as error:
            raise ValueError(
                f"the reference's configuration lacks {error}, received {values!r}"
            ) from error
        except TypeError as error:
            raise ValueError(
                f"the reference's configuration must be a table with a table 'dino', received "
                f"{values!r}"
            ) from error


FPT_BASE = FPTConfig(
    name="fpt-base",
    encoder="vit_base_patch14_reg4_dinov2",
    image_size=448,
    fit="crop",
    width=768,
    depth=12,
    head_dim=64,
    sample_align_corners=True,
    head="reference",
    licence="CC-BY-NC-4.0",
)
