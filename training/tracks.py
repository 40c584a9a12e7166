# SPDX-License-Identifier: MIT
"""Videos with point tracks: making shards of them, and training examples from such shards.

    python -m training.tracks VIDEO... --out DIR --split train

cuts videos into clips and tracks a grid of points through each with pyramidal Lucas-Kanade (Bouguet
2001). Tracks are kept that lead back to where they began and end at what looks alike (Kalal et al.,
"Forward-backward error: automatic detection of tracking failures", ICPR 2010). With ``--tracks``
and ``--visibility`` the tracks of any other tracker are taken instead.

The shards are laid out as the public pipeline's, which can be read too: of each clip a video, the
members ``tracks.npy [T, N, 2]`` (pixels over the video's width and height; x, y) and
``visibility.npy [T, N]`` (bool); beyond that, ``meta.json`` tells where the clip is from. A motion
that nobody knows is NaN: the position of a lost point. That of one that is hidden but followed is
supervised, as there.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fpt_model.config import FPTConfig
from fpt_model.geometry import (
    displacement_pixels_to_normalised,
    grid,
    inside_image,
    normalised_to_pixels,
)
from fpt_ros.commands.media import Frames, FramesWriter
from sim.dataset import shard_files
from training.config import DataConfig
from training.data import (
    Crop,
    Example,
    Shards,
    TarSamples,
    UnusableSample,
    assemble,
    augment,
    observed,
    pick,
    random_crop,
    split_name,
)

log = logging.getLogger("training")

Array = NDArray[np.floating[Any]]
Image = NDArray[np.uint8]

STILL = 0.01  # image sides: what moves less does not move
STATIC_SHARE = 0.4  # of the points stand still where the camera does (the public heuristic)
MIN_TRACKS = 32  # of a clip's first frame that are followed to its end

_MEMBERS = 16  # a sample has fewer
_REMAPPED = 30_000  # rows at most; OpenCV takes fewer than 32,767

_WINDOW = (15, 15)  # px, of Lucas-Kanade
_LEVELS = 4  # of its pyramid
_STEP_TOLERANCE = 0.5  # px, forward-backward error from a frame to the next
_WAY_TOLERANCE = 2.0  # px, from the first frame to the last
_ALIKE = 0.8  # least correlation of what is around a point in the first frame and in the last
_AROUND = 5  # px to each side


# Reading ------------------------------------------------------------------------------------


class Motion(NamedTuple):
    """How the M points that are seen in a frame move until a later one."""

    xy: Array  # [M, 2] px
    flow: Array  # [M, 2] fractions of width and height; NaN: not known

    @property
    def known(self) -> NDArray[np.bool_]:
        """``[M]``."""
        return np.isfinite(self.flow).all(axis=-1)

    @property
    def camera_static(self) -> bool:
        """Whether more than ``STATIC_SHARE`` of the known motions are ``STILL``."""
        lengths = np.linalg.norm(self.flow[self.known], axis=-1)
        return bool((lengths < STILL).mean() > STATIC_SHARE) if len(lengths) else False


@dataclass(frozen=True)
class TrackedClip:
    """A clip and the tracks of N points through its T frames."""

    video: bytes  # a file that OpenCV reads
    suffix: str  # of that file's name
    tracks: Array  # [T, N, 2] px over the video's size; NaN: not known
    visible: NDArray[np.bool_]  # [T, N]
    source: str  # the video that it was cut from

    def __len__(self) -> int:
        return len(self.tracks)

    def frame(self, index: int) -> Image:
        """``[H, W, 3]`` RGB."""
        with tempfile.NamedTemporaryFile(suffix=self.suffix) as file:
            file.write(self.video)
            file.flush()
            for number, picture in enumerate(Frames(Path(file.name))):
                if number == index:
                    return picture
        raise ValueError(
            f"the video of a clip of {self.source} has {number + 1} frames, its tracks {len(self)}"
        )

    def motion(self, start: int, end: int, size: tuple[int, int]) -> Motion:
        """From frame ``start`` to ``end`` of the points seen at the start; (height, width) px."""
        scale = np.array([size[1], size[0]])
        first = self.tracks[start] * scale
        seen = self.visible[start] & inside_image(first, size)
        moved = self.tracks[end, seen] * scale - first[seen]
        return Motion(first[seen], displacement_pixels_to_normalised(moved, size))


class TrackShards(TarSamples):
    """The clips of all shards of a split; FileNotFoundError if there are none."""

    def __getitem__(self, index: int) -> TrackedClip:
        """ValueError naming the file for members that are missing or do not fit."""
        members = self.members(index)
        where = f"{self.where(index)}, sample {index}"
        video = next((m for m in sorted(members) if m.startswith("video.")), None)
        if video is None or not {"tracks.npy", "visibility.npy"} <= members:
            raise ValueError(
                f"{where}: expected video.*, tracks.npy, visibility.npy, found {sorted(members)}"
            )
        tracks, visible = (
            np.load(io.BytesIO(self.read(index, name)), allow_pickle=False)
            for name in ("tracks.npy", "visibility.npy")
        )
        check_tracks(tracks, visible, where)
        meta = json.loads(self.read(index, "meta.json")) if "meta.json" in members else {}
        return TrackedClip(
            self.read(index, video),
            Path(video).suffix,
            tracks.astype(np.float32),
            visible.astype(bool),
            meta.get("source", self.where(index).stem),
        )

    def example(
        self, index: int, model: FPTConfig, config: DataConfig, rng: np.random.Generator
    ) -> Example:
        """An example of one clip, see :func:`make_example`; ValueError for another flow_dim than
        2."""
        if model.flow_dim != 2:
            raise ValueError(
                f"tracked videos show motion in the image, not flow_dim = {model.flow_dim}"
            )
        return make_example(self[index], model.image_size, config, rng, model.fit == "crop")


def check_tracks(tracks: Array, visible: NDArray[np.bool_], where: str) -> None:
    """ValueError, beginning with ``where``, unless they are ``[T, N, 2]`` and ``[T, N]``."""
    if tracks.ndim != 3 or tracks.shape[2] != 2 or visible.shape != tracks.shape[:2]:
        raise ValueError(
            f"{where}: expected tracks [T, N, 2] and visibility [T, N], received shapes "
            f"{list(tracks.shape)} and {list(visible.shape)}"
        )
    if not np.isin(visible, (0, 1)).all():  # scores or logits, whose threshold the tracker knows
        odd = visible[~np.isin(visible, (0, 1))][0]
        raise ValueError(f"{where}: visibility must be true or false (1, 0), received {odd:g}")


def open_shards(folder: str | os.PathLike[str], split: str) -> Shards | TrackShards:
    """The shards of a split: of the simulation, or of videos if that is what they hold."""
    files = shard_files(folder, split)
    if files:
        with tarfile.open(files[0]) as tar:
            files_of_it = filter(tarfile.TarInfo.isfile, tar)
            names = [split_name(member.name) for member in islice(files_of_it, _MEMBERS)]
        if any(key == names[0][0] and rest == "tracks.npy" for key, rest in names):
            return TrackShards(folder, split)
    return Shards(folder, split)


def make_example(
    clip: TrackedClip,
    side: int,
    config: DataConfig,
    rng: np.random.Generator,
    square: bool = False,
) -> Example:
    """As :func:`training.data.make_example`, from a clip and a random start in it.

    A video shows one future and no bodies: all ``futures_per_image`` are that one, with other
    pokes and queries, and ``segment_body`` is 0 throughout, which supervises nothing.

    Raises UnusableSample for a clip that is too short, or with fewer than ``MIN_TRACKS`` points.
    """
    starts = len(clip) - config.horizon_frames
    if starts < 1:
        raise UnusableSample(
            f"a clip of {clip.source} has {len(clip)} frames, too few for data.horizon_frames = "
            f"{config.horizon_frames}"
        )
    image = clip.frame(0)
    size = (image.shape[0], image.shape[1])
    for start in rng.permutation(starts).tolist():
        motion = clip.motion(start, start + config.horizon_frames, size)
        if motion.known.sum() >= MIN_TRACKS:
            break
    else:
        raise UnusableSample(
            f"no frame of a clip of {clip.source} has {MIN_TRACKS} tracks that are known "
            f"{config.horizon_frames} frames later, the last one tried has {motion.known.sum()}"
        )
    image = clip.frame(start)
    crop, inside = random_crop(size, config, rng, square), np.empty(0, np.intp)
    height, width = (min(size), min(size)) if square else size
    # where most of what is known is
    corner = np.median(motion.xy[motion.known], axis=0) - np.array([width, height]) / 2
    left, top = np.clip(corner, 0, [size[1] - width, size[0] - height]).astype(int).tolist()
    for candidate in (crop, Crop(left, top, width, height, crop.flip, crop.turns)):
        crop = candidate
        within = inside_image(motion.xy - [crop.left, crop.top], (crop.height, crop.width))
        inside = np.flatnonzero(within)
        if motion.known[inside].sum() >= MIN_TRACKS:
            break
    else:  # of the whole image that cannot be
        raise UnusableSample(
            f"no square of a clip of {clip.source} has {MIN_TRACKS} known tracks, the last one "
            f"tried has {motion.known[inside].sum()}"
        )
    known = inside[motion.known[inside]]
    moving = known[np.linalg.norm(motion.flow[known], axis=-1) >= STILL]
    positions, motions = crop.positions(motion.xy), crop.displacements(motion.flow, size)

    futures, groups = config.futures_per_image, len(config.visible_pokes)
    placed, moved = [], []
    for _ in range(futures):
        informed = rng.random() < config.informed
        pokes = pick(config.pokes, moving, known, config.poke_on_moving if informed else 0.0, rng)
        if informed and len(moving) and config.pokes and rng.random() < config.first_poke_largest:
            pokes[0] = moving[np.linalg.norm(motion.flow[moving], axis=-1).argmax()]
        queries = rng.choice(inside, groups * config.queries_per_group)
        chosen = np.concatenate([pokes, queries])
        placed.append(positions[chosen])
        moved.append(observed(motions[chosen], config, rng))
    static = motion.camera_static & (rng.random(futures) >= config.hide_static_flag)
    segment = positions[rng.choice(inside, config.segment_points)]
    return assemble(
        augment(crop.image(image, side), config, rng),
        np.stack(placed),
        np.stack(moved),
        static,
        segment,
        np.zeros(len(segment), np.int64),
        config,
    )


# Tracking -----------------------------------------------------------------------------------


def _step(before: Image, after: Image, xy: Array) -> Array:
    """``[N, 2]``: where points went; NaN where Lucas-Kanade gives up or the way back differs."""
    options: dict[str, Any] = {"winSize": _WINDOW, "maxLevel": _LEVELS}
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, xy, None, **options)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **options)
    good = (found[:, 0] == 1) & (found_back[:, 0] == 1)
    good &= np.linalg.norm(back - xy, axis=-1) < _STEP_TOLERANCE
    good &= inside_image(there, (after.shape[0], after.shape[1]))
    return np.where(good[:, None], there, np.nan)


def _follow(frames: list[Image], xy: Array) -> Array:
    """``[T, N, 2]`` px through grey ``frames [T]``: NaN from where a point is lost."""
    tracks = np.full((len(frames), *xy.shape), np.nan, np.float32)
    tracks[0] = xy
    for t in range(1, len(frames)):
        alive = np.isfinite(tracks[t - 1]).all(-1)
        if alive.any():
            tracks[t, alive] = _step(frames[t - 1], frames[t], tracks[t - 1, alive])
    return tracks


def _around(frame: Image, xy: Array) -> Array:
    """``[N, ...]``: the grey values around points ``[N, 2]``, of mean 0 and length 1."""
    steps = np.arange(-_AROUND, _AROUND + 1, dtype=np.float32)
    if len(xy) > _REMAPPED:  # more rows OpenCV does not take
        parts = np.split(xy, range(_REMAPPED, len(xy), _REMAPPED))
        return np.concatenate([_around(frame, part) for part in parts])
    columns, rows = (xy[:, i, None].astype(np.float32) + steps for i in (0, 1))
    n = len(steps)
    values = cv2.remap(
        frame.astype(np.float32),
        np.tile(columns, (1, n)),
        np.repeat(rows, n, axis=1),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    values -= values.mean(-1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-6)


def lucas_kanade(frames: list[Image], xy: Array) -> Array:
    """Tracks ``[T, N, 2]`` (px) of points ``xy [N, 2]`` of the first of the grey ``frames [T]``.

    A point is lost (NaN from there on) where going back one frame does not return to it within
    half a pixel. One that is followed to the end, but not back from there to where it began (within
    2 px), or whose surroundings are others by then, went astray somewhere, such as along an edge
    that swept over it: it is lost from the second frame on.
    """
    tracks = _follow(frames, np.asarray(xy, np.float32))
    last = np.flatnonzero(np.isfinite(tracks[-1]).all(-1))
    start, end = tracks[0, last], tracks[-1, last]
    if len(last):
        good = np.linalg.norm(_follow(frames[::-1], end)[-1] - start, axis=-1) < _WAY_TOLERANCE
        good &= (_around(frames[0], start) * _around(frames[-1], end)).sum(-1) > _ALIKE
        tracks[1:, last[~good]] = np.nan
    return tracks


# Writing ------------------------------------------------------------------------------------


def _clips(frames: Frames, seconds: float, every: float) -> Iterator[tuple[int, list[Image]]]:
    """Number of the first frame and RGB frames of clips that are ``seconds`` from end to end."""
    length, step = (max(1, round(s * frames.fps)) for s in (seconds, every))
    held: list[Image] = []
    for number, frame in enumerate(frames):
        held.append(frame)
        if number % step == length % step and number >= length:
            yield number - length, held[-length - 1 :]
        del held[: -length - 1]


def _encode_video(frames: list[Image], fps: float) -> bytes:
    """Motion JPEG, of which each frame can be decoded by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.avi"
        with FramesWriter(path, True, fps) as writer:
            for frame in frames:
                writer.write(frame)
        return path.read_bytes()


def _given_tracks(
    tracks: Path, visibility: Path, frames: Frames
) -> tuple[Array, NDArray[np.bool_]]:
    given, visible = (np.load(path, allow_pickle=False) for path in (tracks, visibility))
    check_tracks(given, visible, str(tracks))
    if frames.count is not None and len(given) != frames.count:
        raise ValueError(f"{tracks} has {len(given)} frames, the video {frames.count}")
    return given, visible.astype(bool)


def write_clips(
    video: Path,
    path: Path,
    seconds: float = 1.0,
    every: float = 1.0,
    side: int = 64,
    given: tuple[Path, Path] | None = None,
) -> int:
    """Write the clips of a video to a shard; returns their number.

    Args:
        path: of the shard; FileExistsError if there is one.
        seconds: from a clip's first frame to its last.
        every: seconds from a clip to the next.
        side: points of a ``side x side`` grid are tracked.
        given: files with tracks ``[T, N, 2]`` (px of the video) and visibility ``[T, N]`` through
            the whole video, of another tracker.

    Clips with fewer than ``MIN_TRACKS`` points that are followed to the end are left out.
    """
    import webdataset

    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another --out or --split")
    frames = Frames(video)
    ready = _given_tracks(*given, frames) if given else None
    partial = path.with_suffix(".tar.partial")
    written = left_out = 0
    height, width = (n // 2 * 2 for n in frames.size)  # OpenCV's writer leaves out odd ends
    scale = np.array([width, height], np.float32)
    with webdataset.TarWriter(str(partial), user="fpt", group="fpt", mtime=0.0) as writer:
        for first, clip in tqdm(_clips(frames, seconds, every), desc=video.name, unit="clip"):
            clip = [frame[:height, :width] for frame in clip]
            if ready is not None:
                tracks, visible = (a[first : first + len(clip)] for a in ready)
            else:
                grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
                tracks = lucas_kanade(
                    grey, normalised_to_pixels(grid((side, side)), (height, width))
                )
                visible = np.isfinite(tracks).all(-1)
            if np.isfinite(tracks[-1][visible[0]]).all(-1).sum() < MIN_TRACKS:
                left_out += 1
                continue
            meta = {"source": video.name, "frame": first, "fps": frames.fps}
            writer.write(
                {
                    "__key__": f"{video.stem.replace('.', '_')}-{first:06d}",
                    "video.avi": _encode_video(clip, frames.fps),
                    "tracks.npy": (tracks / scale).astype(np.float32),
                    "visibility.npy": visible,
                    "meta.json": json.dumps(meta).encode(),
                }
            )
            written += 1
    if left_out:
        log.warning("%s: left out %d clips with too few tracks", video.name, left_out)
    if not written:
        partial.unlink()
        raise ValueError(
            f"no clip of {video} has {MIN_TRACKS} points that are followed for {seconds} s"
        )
    partial.replace(path)
    return written


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--split", default="train", help="what the shards' names begin with")
    parser.add_argument(
        "--append", action="store_true", help="after the split's shards that are there already"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="from a clip's start to its end")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from clip to clip")
    parser.add_argument("--grid", type=int, default=64, help="side of the grid of tracked points")
    parser.add_argument("--tracks", type=Path, help=".npy [T, N, 2], px of the (one) video")
    parser.add_argument("--visibility", type=Path, help=".npy [T, N], of the same tracker")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = (args.tracks, args.visibility) if args.tracks and args.visibility else None
    if given is None and (args.tracks or args.visibility):
        parser.error("--tracks and --visibility need each other")
    if given and len(args.videos) > 1:
        parser.error(f"--tracks are of one video, received {len(args.videos)}")
    if min(args.seconds, args.every) <= 0 or args.grid < 1:
        parser.error("--seconds, --every and --grid must be positive")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    there = [int(p.stem.rpartition("-")[2]) for p in shard_files(args.out, args.split)]
    first = max(there, default=-1) + 1 if args.append else 0
    for number, video in enumerate(args.videos, first):
        shard = args.out / f"{args.split}-{number:06d}.tar"
        try:
            clips = write_clips(video, shard, args.seconds, args.every, args.grid, given)
        except (OSError, ValueError) as error:  # the other videos may do
            failed.append(str(error))
        else:
            print(f"{shard}: {clips} clips of {video.name}")
    if failed:
        sys.exit(f"{len(failed)} of {len(args.videos)} videos failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
