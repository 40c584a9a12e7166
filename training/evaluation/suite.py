# SPDX-License-Identifier: MIT
"""What a suite is: one YAML file in ``training/suites``, or anywhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "suites"
INTERVALS_OVER = ("world", "kind")


class EvaluationError(ValueError):
    """A user's mistake; the message says what was received and what was expected."""


@dataclass(frozen=True)
class Suite:
    """The settings of a suite. Raises EvaluationError naming the offending value."""

    name: str  # that of the file
    title: str
    splits: tuple[str, ...]  # reported, of simulated worlds or of tracked videos
    make: str  # the command that makes a missing split, with {data} and {split}
    validation: str = "val"  # the simulated split that thresholds, and nothing else, come from
    scenes: int = 250  # at most, of each split
    validation_scenes: int = 250  # at most, and no more than scenes, for thresholds alone
    grid: int = 64  # cells of each side; lengths are reported in cells
    pokes: tuple[int, ...] = (1, 2, 5, 10, 100)  # of the curve
    # image sides, std of the noise that is added to a truth "as tracked": the model was trained to
    # predict what a tracker sees (data.target_noise), the simulation's truth has no noise
    tracking_noise: float = 0.004
    intervals_over: str = "world"  # "world", or "kind" where there are few objects, much alike
    horizon_frames: int | None = None  # of tracked videos; None: to the end of each clip

    def __post_init__(self) -> None:
        for name in ("splits", "pokes"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):  # YAML's are lists
                raise EvaluationError(f"{name} must be a list, received {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.splits:
            raise EvaluationError(f"a suite must have splits, received {self.splits}")
        if self.intervals_over not in INTERVALS_OVER:
            raise EvaluationError(
                f"intervals_over must be one of {INTERVALS_OVER}, received {self.intervals_over!r}"
            )
        if self.pokes[:1] != (1,) or list(self.pokes) != sorted(set(self.pokes)):
            raise EvaluationError(f"pokes must begin with 1 and grow, received {self.pokes}")
        whole = ["validation_scenes", "scenes", "grid"]
        if self.horizon_frames is not None:
            whole.append("horizon_frames")
        for name in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise EvaluationError(f"{name} must be a whole number >= 1, received {value!r}")
        if not isinstance(self.tracking_noise, int | float) or self.tracking_noise < 0:
            raise EvaluationError(f"tracking_noise must be >= 0, received {self.tracking_noise!r}")

    @classmethod
    def load(cls, name: str) -> Suite:
        """A suite of ``training/suites`` by name, or a YAML file.

        Raises EvaluationError for other names, and for unknown or missing keys.
        """
        path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
        if not path.is_file():
            names = sorted(p.stem for p in FOLDER.glob("*.yaml"))
            raise EvaluationError(f"no suite {name!r}: expected one of {names} or a YAML file")
        values: dict[str, Any] = yaml.safe_load(path.read_text())
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "name"}
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if wrong := (set(values) - set(fields)) | (required - set(values)):
            raise EvaluationError(f"{path}: unknown or missing keys {sorted(wrong)}")
        return cls(name=path.stem, **values)

    def quick(self) -> Suite:
        """The same on a few scenes, to see that all runs."""
        return dataclasses.replace(self, scenes=min(self.scenes, 6))
