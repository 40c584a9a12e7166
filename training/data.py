# SPDX-License-Identifier: MIT
"""From stored simulation samples to training examples.

Random access by a global example number makes every example a pure function of (seed, number): a
resumed run sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sim.dataset import StoredSample, read_sample
from training.config import DataConfig, RunConfig

_MAX_FLOW = 1.0  # image sides; motions beyond (points that pass the camera) are not supervised


class Shards:
    """Random access to the samples of all WebDataset shards of a split, in a fixed order."""

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        self.files = sorted(Path(folder).glob(f"{split}-*.tar"))
        if not self.files:
            raise FileNotFoundError(f"no shards {split}-*.tar in {folder}")
        # (file, {extension: (offset, size)}) of each sample
        self._samples: list[tuple[int, dict[str, tuple[int, int]]]] = []
        for number, file in enumerate(self.files):
            with tarfile.open(file) as tar:
                parts: dict[str, dict[str, tuple[int, int]]] = {}
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    parts.setdefault(key, {})[extension] = (member.offset_data, member.size)
            self._samples += [(number, entry) for entry in parts.values()]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> StoredSample:
        number, entry = self._samples[index]
        with open(self.files[number], "rb") as file:
            parts = {}
            for extension, (offset, size) in entry.items():
                file.seek(offset)
                parts[extension] = file.read(size)
        return read_sample(parts)


class Example(NamedTuple):
    """One image with nested pokes and queries, in model coordinates (or a batch of them)."""

    image: Tensor  # uint8 [3, S, S]
    poke_pos: Tensor  # [P, 2]
    poke_flow: Tensor  # [P, D]
    query_pos: Tensor  # [G, n, 2]; group g sees the first visible_pokes[g] pokes
    query_flow: Tensor  # [G, n, D]; NaN: not supervised
    camera_static: Tensor  # bool []


@dataclass(frozen=True)
class Crop:
    """A rectangle of the stored image, in px, that is stretched to the model's square input."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False

    def image(self, rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` to ``[side, side, 3]``."""
        region = rgb[self.top : self.top + self.height, self.left : self.left + self.width]
        shrinking = self.width > side or self.height > side
        out = cv2.resize(
            region, (side, side), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
        )
        return np.ascontiguousarray(out[:, ::-1]) if self.flip else out

    def positions(self, xy: NDArray[np.integer]) -> NDArray[np.float64]:
        """Pixel indices ``[M, 2]`` of the stored image to model positions."""
        out = (xy - [self.left, self.top] + 0.5) / [self.width, self.height]
        if self.flip:
            out[:, 0] = 1 - out[:, 0]
        return out

    def displacements(
        self, flow: NDArray[np.floating], size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """Flow ``[M, 2]`` in units of the stored image of ``size`` to model units."""
        out = flow * [size[1] / self.width, size[0] / self.height]
        if self.flip:
            out[:, 0] *= -1
        return out


def random_crop(size: tuple[int, int], config: DataConfig, rng: np.random.Generator) -> Crop:
    """A crop with independent width and height; a third of the time the whole image."""
    height, width = size
    if rng.random() < 1 / 3:
        w, h = width, height
    else:
        w, h = (round(s * rng.uniform(config.min_crop, 1)) for s in (width, height))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return Crop(left, top, w, h, bool(rng.random() < config.flip))


def jitter_colours(
    image: NDArray[np.uint8], strength: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Random gamma, saturation, gain, white balance, offset, channel order, blur and noise."""
    s = strength
    gamma = np.exp(rng.uniform(-s, s))
    table = ((np.arange(256) / 255) ** gamma).astype(np.float32)
    saturation = rng.uniform(1 - 1.5 * s, 1 + s)
    mix = saturation * np.eye(3) + (1 - saturation) / 3
    mix *= rng.uniform(1 - s, 1 + s) * rng.uniform(1 - s / 3, 1 + s / 3, (3, 1))
    if rng.random() < 0.2:
        mix = mix[rng.permutation(3)]
    offset = np.full((3, 1), rng.uniform(-s / 3, s / 3))
    x = cv2.transform(table[image], np.hstack([mix, offset]))
    if rng.random() < 0.3:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 1.0))
    if rng.random() < 0.3:
        x = x + rng.standard_normal(x.shape, np.float32) * rng.uniform(0, 0.05)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def make_example(
    sample: StoredSample, side: int, config: DataConfig, rng: np.random.Generator
) -> Example:
    """Choose a future, a crop, pokes and queries.

    Where a query lies depends on the image alone (never on what moves in the chosen future), so
    that the learned distributions are not biased towards motion.
    """
    size = sample.rgb.shape[:2]
    future = int(rng.integers(sample.futures))
    crop = random_crop(size, config, rng)
    window = np.zeros(size, dtype=bool)
    window[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width] = True

    anywhere = np.flatnonzero(window)
    moving = np.flatnonzero(window & sample.moving[future][sample.bodies])
    movable = np.flatnonzero(window & sample.moving.any(0)[sample.bodies])

    count, groups = config.pokes, len(config.visible_pokes)
    n = groups * config.queries_per_group
    pokes = _pick(count, moving, anywhere, config.poke_on_moving, rng)
    queries = _pick(n, movable, anywhere, config.query_on_movable, rng)
    index = np.concatenate([pokes, queries])

    xy = np.stack([index % size[1], index // size[1]], -1)
    true = sample.flow_at(future, xy).flow
    pos, flow = crop.positions(xy), crop.displacements(true, size)
    flow += rng.normal(0, config.target_noise, flow.shape)
    flow[:count] *= 1 + rng.normal(0, config.poke_noise, (count, 1))
    np.clip(flow[:count], -_MAX_FLOW, _MAX_FLOW, out=flow[:count])
    flow[count:][np.abs(flow[count:]).max(-1) > _MAX_FLOW] = np.nan

    static = sample.camera_static[future] and rng.random() >= config.hide_static_flag
    image = jitter_colours(crop.image(sample.rgb, side), config.colour, rng)

    def tensor(x: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(x.astype(np.float32))

    return Example(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        poke_pos=tensor(pos[:count]),
        poke_flow=tensor(flow[:count]),
        query_pos=tensor(pos[count:]).view(groups, -1, 2),
        query_flow=tensor(flow[count:]).view(groups, -1, 2),
        camera_static=torch.tensor(bool(static)),
    )


def _pick(
    n: int,
    preferred: NDArray[np.intp],
    anywhere: NDArray[np.intp],
    probability: float,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """``n`` pixel indices, each from ``preferred`` with ``probability`` where that is not empty."""
    out = rng.choice(anywhere, n)
    if len(preferred):
        chosen = rng.random(n) < probability
        out[chosen] = rng.choice(preferred, int(chosen.sum()))
    return out


class ExampleDataset(Dataset[Example]):
    """Example number ``i`` of an endless, shuffled sequence over the shards."""

    def __init__(self, shards: Shards, config: RunConfig) -> None:
        self.shards, self.config = shards, config
        self._epoch = -1
        self._order: NDArray[np.intp] = np.empty(0, dtype=np.intp)

    def __getitem__(self, number: int) -> Example:
        seed, (epoch, position) = self.config.optim.seed, divmod(number, len(self.shards))
        if epoch != self._epoch:
            self._order = np.random.default_rng([seed, 0, epoch]).permutation(len(self.shards))
            self._epoch = epoch
        rng = np.random.default_rng([seed, 1, number])
        sample = self.shards[int(self._order[position])]
        return make_example(sample, self.config.model.image_size, self.config.data, rng)


def training_batches(
    dataset: ExampleDataset, batch_size: int, first_step: int, steps: int, workers: int = 1
) -> Iterator[Example]:
    """The batches of steps ``first_step`` to ``steps - 1``."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(first_step * batch_size, steps * batch_size),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=lambda _: cv2.setNumThreads(0),
    )
    return iter(loader)
