# SPDX-License-Identifier: MIT
"""The configuration of a training run: one YAML file, three sections."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fpt_model import FPTConfig


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, received {value!r}")


def _check_between(name: str, value: Any, most: float = 1.0) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{name} must be in [0, {most:g}], received {value!r}")


@dataclass(frozen=True)
class DataConfig:
    """How stored simulation samples become training examples."""

    # a group of queries for each entry, which sees that many of the image's pokes; few pokes are
    # both the harder task and the one users have, so they get the more queries. A number n means
    # 0, 1, ... n - 1, as in the paper
    visible_pokes: tuple[int, ...] = (0, 1, 1, 1, 1, 2, 2, 3, 4, 6, 10, 16)
    queries_per_group: int = 12
    futures_per_image: int = 1  # of one crop, encoded once: encoding dominates a step's cost
    # so large a share of the shown futures has a moving camera, where an image has such and others
    # stored; None: as stored. Of simulated images only, as is near_futures
    moving_camera: float | None = None
    # image sides: an image's futures are drawn by weights in proportion to this plus their largest
    # motion, so that the steps go where most of the error is; None: all alike. Of what a poke where
    # the motion is largest tells that changes nothing; what is expected without pokes, or with one
    # anywhere, becomes farther than it is
    near_futures: float | None = None
    segment_points: int = 0  # points whose rigid body is told, for an auxiliary loss
    # motions
    # frames from the picture to the end of its motion, in shards of tracked videos; theirs alone
    horizon_frames: int = 25
    target_noise: float = 0.004  # image sides, std of the tracking noise added to all motions,
    # and that of relative depth
    poke_noise: float = 0.02  # further relative noise of the pokes' motion
    hide_static_flag: float = 0.1  # probability that a static camera is given as unknown
    # of three-dimensional models: probability that an example's first pokes, any number of them,
    # come without their motion in depth: users draw in the image, joint samples then follow
    planar_pokes: float = 0.5
    # where pokes and queries lie
    informed: float = (
        0.85  # share of examples whose pokes prefer what moves, else they fall anywhere
    )
    poke_on_moving: float = 0.6  # in those, probability that a poke is placed on what moves
    # in those, probability that the first poke is where the motion is about largest: a handle, an
    # edge far from the hinge. Otherwise all else would seem to move as far again, on average.
    first_poke_largest: float = 0.0
    query_on_bodies: float = 0.5  # share of queries on bodies, rather than anywhere in the image
    # views
    min_crop: float = 0.5  # fraction of the image's side, each axis by itself (aspect ratios)
    flip: float = 0.5  # probability of mirroring left and right
    quarter_turn: float = 0.2  # probability of a turn by 90, 180 or 270 degrees
    # looks
    colour: float = 0.4  # strength of colour jitter
    light: float = 0.3  # probabilities: uneven light or a shadow,
    blur: float = 0.3  # a little defocus,
    downscale: float = 0.15  # fewer pixels, down to half,
    noise: float = 0.3  # sensor noise,
    jpeg: float = 0.3  # compression

    def __post_init__(self) -> None:
        counts = self.visible_pokes
        counts = range(counts) if isinstance(counts, int) else counts
        if (
            not isinstance(counts, range | list | tuple)
            or not counts
            or not all(isinstance(n, int) and n >= 0 for n in counts)
        ):
            raise ValueError(f"visible_pokes must be counts >= 0, received {self.visible_pokes!r}")
        object.__setattr__(self, "visible_pokes", tuple(counts))
        for name, least in (
            ("queries_per_group", 1),
            ("futures_per_image", 1),
            ("segment_points", 0),
            ("horizon_frames", 1),
        ):
            _check_whole(name, getattr(self, name), least)
        if self.moving_camera is not None:
            _check_between("moving_camera", self.moving_camera)
        for name in (
            *("hide_static_flag", "planar_pokes", "informed", "poke_on_moving"),
            *("first_poke_largest", "query_on_bodies", "min_crop", "flip", "quarter_turn"),
            *("colour", "light", "blur", "downscale", "noise", "jpeg"),
        ):
            _check_between(name, getattr(self, name))
        if not self.min_crop:
            raise ValueError("min_crop must be > 0, received 0")
        for name in ("target_noise", "poke_noise"):
            _check_between(name, getattr(self, name), math.inf)
        near = self.near_futures
        if near is not None and not (isinstance(near, int | float) and 0 < near < math.inf):
            raise ValueError(f"near_futures must be > 0, received {near!r}")

    def without_augmentation(self) -> DataConfig:
        """The same pokes and queries on whole, clean images with true motions, for validation."""
        return replace(
            self,
            **dict.fromkeys(("target_noise", "poke_noise", "hide_static_flag"), 0.0),
            **dict.fromkeys(("flip", "quarter_turn", "colour", "light", "blur"), 0.0),
            **dict.fromkeys(("downscale", "noise", "jpeg"), 0.0),
            **dict.fromkeys(("moving_camera", "near_futures")),  # as stored
            min_crop=1.0,
        )

    @property
    def pokes(self) -> int:
        """Pokes of an image."""
        return max(self.visible_pokes)


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation; see training.train."""

    batch_size: int = 32  # images of a step, of all processes together
    steps: int = 1000
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 3e-4
    warmup_steps: int = 100
    # the rate stays at its peak until the last so many steps, so that a run may be continued from
    # a checkpoint before them; None, or more than there are: it falls from the warm-up's end on
    decay_steps: int | None = None
    weight_decay: float = 0.02
    gradient_clip: float = 1.0
    # probability that a motion is nothing the model could know, e.g. that of a pixel on an edge;
    # bounds the loss of one point, without it a few confident misses drown all others
    outlier_share: float = 1e-3
    # of the energy score, in nats per side of the image: the likelihood counts a miss the same
    # however far it is, this counts it by its distance
    energy_weight: float = 0.0
    # of the auxiliary loss on which points belong to one body; needs data.segment_points
    segment_weight: float = 0.0
    ema_decay: float = 0.999
    frozen_encoder_stages: int = 0  # leading stages of a convolutional encoder left as they are
    # the encoder starts from ImageNet weights (true) or those in a file, see training.pretrained
    pretrained_encoder: bool | str = False
    # go on from a shipped model's name or file; see training.train.start_from for what may differ
    start_from: str | None = None
    # of the weight matrices inside transformer blocks: "muon" (Jordan et al. 2024) gives all their
    # directions the same rate, all else is trained by AdamW
    optimiser: str = "adamw"
    precision: str = "bf16"  # "fp32" or "bf16" (autocast)
    compile: bool = False  # torch.compile: a minute at the start, then about a fifth faster
    seed: int = 0
    checkpoint_every: int = 250  # steps
    validate_every: int = 500  # steps

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", received {self.precision!r}')
        if self.optimiser not in ("adamw", "muon"):
            raise ValueError(f'optimiser must be "adamw" or "muon", received {self.optimiser!r}')
        for name in ("batch_size", "steps", "checkpoint_every", "validate_every"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "frozen_encoder_stages", "seed"):
            _check_whole(name, getattr(self, name), 0)
        if self.decay_steps is not None:
            _check_whole("decay_steps", self.decay_steps, 0)
        for name in ("learning_rate", "encoder_learning_rate", "weight_decay", "energy_weight"):
            _check_between(name, getattr(self, name), math.inf)
        _check_between("segment_weight", self.segment_weight, math.inf)
        for name in ("outlier_share", "ema_decay"):
            _check_between(name, getattr(self, name))
        if not isinstance(self.gradient_clip, int | float) or not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be > 0, received {self.gradient_clip!r}")
        if self.start_from is not None and not isinstance(self.start_from, str):
            raise ValueError(f"start_from must be a name or a file, received {self.start_from!r}")
        if self.pretrained_encoder and self.start_from:
            raise ValueError(
                "pretrained_encoder and start_from exclude each other, received "
                f"{self.pretrained_encoder!r} and {self.start_from!r}"
            )


@dataclass(frozen=True)
class RunConfig:
    """All of a run."""

    model: FPTConfig = field(default_factory=FPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if self.optim.segment_weight and not self.data.segment_points:
            raise ValueError(
                f"segment_weight = {self.optim.segment_weight:g} needs segment_points > 0, "
                f"received {self.data.segment_points}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """ValueError names unknown sections and keys."""
        sections = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(sections))
        if unknown:
            raise ValueError(f"unknown sections {unknown}, expected {sorted(sections)}")
        return cls(
            model=FPTConfig.from_dict(values.get("model", {})),
            data=_section(DataConfig, values.get("data", {})),
            optim=_section(OptimConfig, values.get("optim", {})),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
        """Read a YAML file; ``overrides`` are ``section.key=value`` with YAML values.

        A file may name another one, beside it, that it ``extends``: what it does not give is as
        there.
        """
        values = _read(Path(path))
        for item in overrides or []:
            name, _, value = item.partition("=")
            section, _, key = name.partition(".")
            if not (key and value):
                raise ValueError(f"expected section.key=value, received {item!r}")
            values.setdefault(section, {})[key] = yaml.safe_load(value)
        return cls.from_dict(values)


def _read(path: Path, *extended_by: Path) -> dict[str, Any]:
    """The sections of a YAML file and of those that it extends."""
    if path in extended_by:
        raise ValueError(f"{path} extends itself by way of {[str(p) for p in extended_by]}")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections, received {values!r}")
    parent = values.pop("extends", None)
    sections = _read(path.parent / parent, *extended_by, path) if parent else {}
    for name, entries in values.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: section {name} must hold keys, received {entries!r}")
        sections[name] = {**sections.get(name, {}), **entries}
    return sections


def _section(cls: type, values: dict[str, Any]) -> Any:
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"unknown keys {unknown} for {cls.__name__}")
    for f in dataclasses.fields(cls):
        value = values.get(f.name)
        # YAML takes 1e-3 for a word: only 1.0e-3 is a number
        if isinstance(value, str) and re.search(r"\b(int|float)\b", str(f.type)):
            values = {**values, f.name: _number(f"{cls.__name__}.{f.name}", value, str(f.type))}
    return cls(**values)


def _number(name: str, text: str, kind: str) -> int | float:
    try:
        number = float(text)
        if "float" in kind:
            return number
        if number == round(number):
            return round(number)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number ({kind}), received {text!r}")
