# SPDX-License-Identifier: MIT
"""From stored simulation samples to training examples (tracked videos: `training.tracks`).

Random access by a global example number makes every example a pure function of (seed, number): a
resumed run sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fpt_model.config import FPTConfig
from fpt_model.encoder import resize_square
from fpt_model.geometry import (
    ModelView,
    displacement_normalised_to_pixels,
    displacement_pixels_to_normalised,
    pixels_to_normalised,
)
from sim.dataset import FORMAT, StoredSample, read_sample, shard_files
from training.config import DataConfig, RunConfig

log = logging.getLogger("training")

_DRAWS = 256  # unusable images in a row end the run
_CANDIDATES = 64  # points among which the one that moves most is found
_MAX_FLOW = 1.0  # image sides; motions beyond (points that pass the camera) are not supervised


def split_name(member: str) -> tuple[str, str]:
    """The sample that a shard's member is of, and which part: at its file name's first dot.

    As WebDataset has it: folders may have dots of their own.
    """
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension


class TarSamples:
    """Random access to the members of all WebDataset shards of a split, in a fixed order.

    Raises FileNotFoundError if there are none.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        self.files = shard_files(folder, split)
        if not self.files:
            raise FileNotFoundError(f"no shards {split}-NUMBER.tar in {folder}")
        # (file, {extension: (offset, size)}) of each sample
        self._samples: list[tuple[int, dict[str, tuple[int, int]]]] = []
        for number, file in enumerate(self.files):
            with tarfile.open(file) as tar:
                parts: dict[str, dict[str, tuple[int, int]]] = {}
                for member in filter(tarfile.TarInfo.isfile, tar):
                    key, extension = split_name(member.name)
                    parts.setdefault(key, {})[extension] = (member.offset_data, member.size)
            self._samples += [(number, entry) for entry in parts.values()]

    def __len__(self) -> int:
        return len(self._samples)

    def members(self, index: int) -> set[str]:
        """The members of a sample, such as "rgb.jpg"."""
        return set(self._samples[index][1])

    def where(self, index: int) -> Path:
        """The file that a sample is in."""
        return self.files[self._samples[index][0]]

    def read(self, index: int, member: str) -> bytes:
        """The content of a member of a sample."""
        number, entry = self._samples[index]
        offset, size = entry[member]
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            return file.read(size)


class Shards(TarSamples):
    """The samples of `sim.dataset`.

    Without a manifest (the shards are still being made) those present are taken as they are.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the manifest has another format or, naming them, lists other files.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        super().__init__(folder, split)
        self.manifest = self._read_manifest(Path(folder) / f"manifest-{split}.json")

    def _read_manifest(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            log.warning("no %s: taking the %d shards that are there", path, len(self.files))
            return {}
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path} has format {manifest['format']}, expected {FORMAT}")
        listed, found = {s["file"] for s in manifest["shards"]}, {f.name for f in self.files}
        if listed != found:
            raise ValueError(
                f"the shards beside {path} are not those it lists: missing "
                f"{sorted(listed - found)}, not listed {sorted(found - listed)}"
            )
        if not manifest["complete"]:
            log.warning("%s is not complete: it lists %d shards", path, len(listed))
        return manifest

    @property
    def generator(self) -> int | None:
        """Version of the simulation that made the shards; None if the manifest does not say."""
        return self.manifest.get("generator")

    @cached_property
    def worlds(self) -> list[tuple[str, int]]:
        """(kind, seed) of the world of each image; several images may show the same one."""
        metas = (json.loads(self.read(i, "meta.json")) for i in range(len(self)))
        return [(meta["kind"], meta["seed"]) for meta in metas]

    def __getitem__(self, index: int) -> StoredSample:
        members = {member: self.read(index, member) for member in self.members(index)}
        return read_sample({**members, "__key__": f"{index} of {self.where(index)}"})

    def example(
        self, index: int, model: FPTConfig, config: DataConfig, rng: np.random.Generator
    ) -> Example:
        """An example of one image, see :func:`make_example`."""
        square = model.fit == "crop"
        return make_example(self[index], model.image_size, config, rng, model.flow_dim, square)


class Example(NamedTuple):
    """One image with F futures of nested pokes and queries, in model coordinates.

    Batches have a leading axis B everywhere.
    """

    image: Tensor  # uint8 [3, S, S]
    poke_pos: Tensor  # [F, P, 2]
    poke_flow: Tensor  # [F, P, D]; third component NaN: not told
    query_pos: Tensor  # [F, G, n, 2]; group g sees the first visible_pokes[g] pokes of its future
    query_flow: Tensor  # [F, G, n, D]; NaN: not supervised
    camera_static: Tensor  # bool [F]
    segment_pos: Tensor  # [M, 2]: points of the image whose body is told
    segment_body: Tensor  # int64 [M]: the rigid body at each, 0 is the static world


@dataclass(frozen=True)
class Crop:
    """A rectangle of the stored image, in px, that is stretched to the model's square input.

    ``flip`` mirrors left and right; then come ``turns`` quarter turns counterclockwise.
    """

    left: int
    top: int
    width: int
    height: int
    flip: bool = False
    turns: int = 0

    @property
    def box(self) -> tuple[slice, slice]:
        """The rectangle as an index into the stored image."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    def image(self, rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` to ``[side, side, 3]``, resized as the model's preprocessing does."""
        region = torch.from_numpy(np.ascontiguousarray(rgb[self.box]))
        resized = resize_square(region.permute(2, 0, 1)[None].float(), side)[0]
        out = resized.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return np.ascontiguousarray(np.rot90(out[:, ::-1] if self.flip else out, self.turns))

    def positions(self, xy: NDArray[np.number]) -> NDArray[np.float64]:
        """Pixels ``[M, 2]`` of the stored image to model positions."""
        inside = pixels_to_normalised(xy - [self.left, self.top], (self.height, self.width))
        return (inside - 0.5) @ self._axes.T + 0.5

    def displacements(
        self, flow: NDArray[np.floating], size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """Flow ``[M, D]`` in units of the stored image of ``size`` to model units.

        A third component, relative depth, is the same in all views.
        """
        pixels = displacement_normalised_to_pixels(flow[:, :2], size)
        inside = displacement_pixels_to_normalised(pixels, (self.height, self.width))
        return np.concatenate([inside @ self._axes.T, flow[:, 2:]], -1)

    @property
    def _axes(self) -> NDArray[np.int_]:
        """``[2, 2]``: mirroring and turning, about the centre of the square."""
        mirror = np.diag([-1 if self.flip else 1, 1])
        quarter = np.array([[0, 1], [-1, 0]])  # what was on the right goes to the top
        return np.linalg.matrix_power(quarter, self.turns) @ mirror


def random_crop(
    size: tuple[int, int], config: DataConfig, rng: np.random.Generator, square: bool = False
) -> Crop:
    """A crop with independent width and height; a third of the time the whole image.

    ``square``: with equal width and height, and the largest there is in place of the whole image.
    With ``min_crop`` 1 it is the middle one.
    """
    height, width = size
    w, h = (min(size), min(size)) if square else (width, height)
    if rng.random() >= 1 / 3:
        w, h = (max(1, round(s * rng.uniform(config.min_crop, 1))) for s in (w, h))
        w, h = (w, w) if square else (w, h)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    if square and config.min_crop == 1:  # as for inference
        left, top, *_ = ModelView(height, width, "crop").box
    flip = bool(rng.random() < config.flip)
    turns = int(rng.integers(1, 4)) if rng.random() < config.quarter_turn else 0
    return Crop(left, top, w, h, flip, turns)


def augment(
    image: NDArray[np.uint8], config: DataConfig, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Change how ``[S, S, 3]`` looks, not where anything is: light, colours, lens and codec."""
    side = image.shape[0]
    x = jitter_colours(image, config.colour, rng)
    if rng.random() < config.light:
        x *= light_field(side, rng)[..., None]
    if rng.random() < config.blur:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 1.0))
    if rng.random() < config.downscale:
        small = round(side * rng.uniform(0.5, 0.9))
        x = cv2.resize(x, (small, small), interpolation=cv2.INTER_AREA)
        x = cv2.resize(x, (side, side), interpolation=cv2.INTER_LINEAR)
    if rng.random() < config.noise:
        x += rng.standard_normal(x.shape, np.float32) * np.float32(rng.uniform(0, 0.05))
    out = (np.clip(x, 0, 1) * 255).round().astype(np.uint8)
    if rng.random() < config.jpeg:
        quality = int(rng.integers(40, 96))
        # OpenCV takes the channels for B, G, R; swapped or not, the codec's damage is alike
        _, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, quality])
        out = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return out


def jitter_colours(
    image: NDArray[np.uint8], strength: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Random gamma, saturation, gain, white balance, offset, channel order; about [0, 1]."""
    s = strength
    gamma = np.exp(rng.uniform(-s, s))
    table = ((np.arange(256) / 255) ** gamma).astype(np.float32)
    saturation = rng.uniform(1 - 1.5 * s, 1 + s)
    mix = saturation * np.eye(3) + (1 - saturation) / 3
    mix *= rng.uniform(1 - s, 1 + s) * rng.uniform(1 - s / 3, 1 + s / 3, (3, 1))
    if rng.random() < s / 2:
        mix = mix[rng.permutation(3)]
    offset = np.full((3, 1), rng.uniform(-s / 3, s / 3))
    return cv2.transform(table[image], np.hstack([mix, offset]))


def light_field(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """``[side, side]`` factors: uneven light, or in a third of cases the shadow of something."""
    n = int(rng.integers(3, 6))
    coarse = rng.uniform(0.5, 1.4, (n, n)).astype(np.float32)
    smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 2 / 3:
        return smooth
    shadow = (smooth < rng.uniform(0.7, 1.0)).astype(np.float32)
    soft = cv2.GaussianBlur(shadow, (0, 0), rng.uniform(0.5, 3.0))
    return 1 - np.float32(rng.uniform(0.2, 0.6)) * soft


def make_example(
    sample: StoredSample,
    side: int,
    config: DataConfig,
    rng: np.random.Generator,
    dims: int = 2,
    square: bool = False,
) -> Example:
    """Choose a crop, futures, and for each pokes and queries, with motions of ``dims`` components.

    ``square`` crops are for models that see a square of an image (``fit: crop``).

    Where a query lies depends on the image alone (never on what moves in some future), so that the
    learned distributions are not biased towards motion.
    """
    size = (sample.rgb.shape[0], sample.rgb.shape[1])
    crop = random_crop(size, config, rng, square)
    pixels = np.arange(size[0] * size[1]).reshape(size)[crop.box].ravel()
    bodies = sample.bodies.ravel()[pixels]
    on_bodies = pixels[bodies > 0]

    def points(index: NDArray[np.intp]) -> NDArray[np.intp]:
        return np.stack([index % size[1], index // size[1]], -1)

    def lengths(future: int, index: NDArray[np.intp]) -> NDArray[np.floating]:
        return np.linalg.norm(sample.flow_at(future, points(index)).flow, axis=-1)

    count, groups = config.pokes, len(config.visible_pokes)
    moves = sample.moving
    weights = None
    if config.near_futures is not None and len(on_bodies):
        some = rng.choice(on_bodies, _CANDIDATES)
        moving_some = moves[:, sample.bodies.ravel()[some]]  # [F, _CANDIDATES]
        largest = [lengths(f, some[m]).max(initial=0) for f, m in enumerate(moving_some)]
        weights = config.near_futures + np.minimum(np.float64(largest), _MAX_FLOW)
    futures = choose_futures(sample.camera_static, weights, config, rng)
    static = sample.camera_static[futures] & (rng.random(len(futures)) >= config.hide_static_flag)
    placed, moved = [], []
    for future in futures:
        # Pokes are put on what moves more often than chance would, or few would tell anything. But
        # if they always were, still pokes would say that nothing moves anywhere, the more the more
        # of them. With a share of examples where pokes fall anywhere they can say so only weakly.
        informed = rng.random() < config.informed
        on_moving = config.poke_on_moving if informed else 0.0
        moving = pixels[moves[future][bodies]]
        pokes = pick(count, moving, pixels, on_moving, rng)
        if informed and count and len(moving) and rng.random() < config.first_poke_largest:
            candidates = rng.choice(moving, _CANDIDATES)
            pokes[0] = candidates[lengths(int(future), candidates).argmax()]
        xy = points(
            np.concatenate(
                [
                    pokes,
                    pick(
                        groups * config.queries_per_group,
                        on_bodies,
                        pixels,
                        config.query_on_bodies,
                        rng,
                    ),
                ]
            )
        )
        flow = crop.displacements(sample.flow_at(int(future), xy).motion[:, :dims], size)
        placed.append(crop.positions(xy))
        moved.append(observed(flow, config, rng))
    segment = pick(config.segment_points, on_bodies, pixels, 0.5, rng)
    image = augment(crop.image(sample.rgb, side), config, rng)
    bodies = sample.bodies.ravel()[segment]
    return assemble(
        image,
        np.stack(placed),
        np.stack(moved),
        static,
        crop.positions(points(segment)),
        bodies,
        config,
    )


def choose_futures(
    static: NDArray[np.bool_],
    weights: NDArray[np.float64] | None,
    config: DataConfig,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """Of the futures of an image, of which ``static [F]`` have a still camera, those to show.

    They are drawn by the positive ``weights [F]``, None: all alike. No future is shown twice unless
    there are too few of its kind, so that of several the near ones are more than in proportion. How
    often the camera moves does not depend on the weights.
    """
    count, share = config.futures_per_image, config.moving_camera
    if share is None or static.all() or not static.any():
        if weights is None:
            return rng.choice(len(static), count, replace=len(static) < count)
        share = np.mean(~static)  # as stored
    weights = np.ones(len(static)) if weights is None else weights
    moving = rng.random(count) < share
    chosen = np.empty(count, np.intp)
    for group, here in ((static, ~moving), (~static, moving)):
        if n := np.count_nonzero(here):
            which = np.flatnonzero(group)
            p = weights[which] / weights[which].sum()
            chosen[here] = rng.choice(which, n, replace=len(which) < n, p=p)
    return chosen


def observed(
    flow: NDArray[np.float64], config: DataConfig, rng: np.random.Generator
) -> NDArray[np.float64]:
    """True motions ``[pokes + queries, D]`` with noise; NaN for queries of unusable ones, and for
    the motion in depth of pokes that are given without it."""
    count = config.pokes
    flow = flow + rng.normal(0, config.target_noise, flow.shape)
    flow[:count] *= 1 + rng.normal(0, config.poke_noise, (count, 1))
    np.clip(flow[:count], -_MAX_FLOW, _MAX_FLOW, out=flow[:count])
    flow[count:][np.abs(flow[count:]).max(-1) > _MAX_FLOW] = np.nan
    if flow.shape[1] == 3 and count and rng.random() < config.planar_pokes:
        flow[: rng.integers(1, count + 1), 2] = np.nan
    return flow


def assemble(
    image: NDArray[np.uint8],
    positions: NDArray[np.float64],
    motions: NDArray[np.float64],
    static: NDArray[np.bool_],
    segment_pos: NDArray[np.float64],
    segment_body: NDArray[np.integer],
    config: DataConfig,
) -> Example:
    """An example of ``image [S, S, 3]``.

    ``positions [F, N, 2]`` and ``motions [F, N, D]`` begin with the pokes, the queries follow,
    group by group; ``static [F]``, ``segment_pos [M, 2]``, ``segment_body [M]``.
    """

    def tensor(x: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(x.astype(np.float32))

    count, groups = config.pokes, len(config.visible_pokes)
    pos, flow = tensor(positions), tensor(motions)
    return Example(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        poke_pos=pos[:, :count],
        poke_flow=flow[:, :count],
        query_pos=pos[:, count:].unflatten(1, (groups, -1)),
        query_flow=flow[:, count:].unflatten(1, (groups, -1)),
        camera_static=torch.from_numpy(static),
        segment_pos=tensor(segment_pos),
        segment_body=torch.from_numpy(segment_body.astype(np.int64)),
    )


def pick(
    n: int,
    preferred: NDArray[np.intp],
    anywhere: NDArray[np.intp],
    probability: float,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """``n`` pixel indices, each from ``preferred`` with ``probability`` where that is not empty.

    None of either is drawn twice where there are enough, as in the public implementation.
    """
    out = rng.choice(anywhere, n, replace=len(anywhere) < n)
    if len(preferred):
        chosen = rng.random(n) < probability
        count = int(chosen.sum())
        out[chosen] = rng.choice(preferred, count, replace=len(preferred) < count)
    return out


class UnusableSample(ValueError):
    """No example can be made of this image or clip; of others it may."""


class ExampleSource(Protocol):
    """A numbered collection of images that examples are made of."""

    def __len__(self) -> int: ...

    def example(
        self, index: int, model: FPTConfig, config: DataConfig, rng: np.random.Generator
    ) -> Example:
        """An example of image ``index`` for the model; :class:`UnusableSample` if there is none."""
        ...


class ExampleDataset(Dataset[Example]):
    """Example number ``i`` of an endless, shuffled sequence over the shards.

    In place of what no example can be made of, which is named in a warning, another is drawn;
    :class:`UnusableSample` where so many in a row are unusable that the data must be at fault.
    """

    def __init__(self, shards: ExampleSource, config: RunConfig) -> None:
        self.shards, self.config = shards, config
        self._epoch = -1
        self._order: NDArray[np.intp] = np.empty(0, dtype=np.intp)
        self._unusable: set[int] = set()  # warned of

    def __getitem__(self, number: int) -> Example:
        seed, (epoch, position) = self.config.optim.seed, divmod(number, len(self.shards))
        if epoch != self._epoch:
            self._order = np.random.default_rng([seed, 0, epoch]).permutation(len(self.shards))
            self._epoch = epoch
        rng = np.random.default_rng([seed, 1, number])
        index, model = int(self._order[position]), self.config.model
        found: UnusableSample | None = None
        for _ in range(_DRAWS):
            try:
                return self.shards.example(index, model, self.config.data, rng)
            except UnusableSample as error:
                found = error
                if index not in self._unusable:
                    self._unusable.add(index)
                    log.warning("no example of sample %d, another is taken: %s", index, error)
            index = int(rng.integers(len(self.shards)))
        raise UnusableSample(f"{_DRAWS} samples in a row are of no use, the last: {found}")


class Share(Sampler[int]):
    """The example numbers of one of ``world`` processes, in the steps ``first`` to ``last - 1``.

    Step s is of the numbers from ``s * batch_size`` on, whatever the number of processes: each has
    its part of them, and one after the other they are the whole.

    Raises ValueError for a batch that cannot be split evenly.
    """

    def __init__(
        self, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise ValueError(
                "optim.batch_size, which is that of all processes together, must be a multiple of "
                f"their number, received {batch_size} for {world} processes"
            )
        self.batch_size, self.steps = batch_size, range(first, last)
        self.local = batch_size // world  # of one process
        self.offset = rank * self.local

    def __len__(self) -> int:
        return len(self.steps) * self.local

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            begin = step * self.batch_size + self.offset
            yield from range(begin, begin + self.local)


def load_batches(
    dataset: ExampleDataset, numbers: Sampler[int] | range, batch_size: int, workers: int
) -> Iterator[Example]:
    """Examples of ``numbers``, in batches, made by so many processes beside this one."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=lambda _: cv2.setNumThreads(0),
    )
    return iter(loader)
