# SPDX-License-Identifier: MIT
"""Samples of simulated worlds as WebDataset shards: writing, checking and decoding.

    python -m sim.dataset --out DIR --split train --images 60000 --size 128 --workers 2

writes DIR/train-000000.tar ... and DIR/manifest-train.json (checksums, settings). A shard depends
on the split, its index, the settings, `GENERATOR`, MuJoCo and the renderer alone (foreign ones on
the packages, too), so shards may be made by any number of workers or jobs (`--shards i:n` makes
each n-th one, starting with i); finished ones are kept when the command is repeated. The split
"foreign" needs `--assets`, see `sim.foreign`.

An image's members: rgb.jpg, depth.png (uint16, `depth_scale` metres a step, 0 = none), bodies.png
(uint8), body_motion.npy [F, n, 4, 4], camera_motion.npy [F, 4, 4] and meta.json. Conventions are
those of `sim.flow`. Reading needs neither MuJoCo nor OpenGL.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from sim.flow import PointFlow, moving_bodies, point_flow
from sim.kinds import FOREIGN_KINDS, HELD_OUT_KINDS, TRAIN_KINDS

if TYPE_CHECKING:
    from sim.simulator import Frame, Future, Simulator

SPLITS: dict[str, tuple[str, ...]] = {
    "train": (*TRAIN_KINDS, *["assembly"] * 4),  # the kind with the most variety, five times
    "val": TRAIN_KINDS,
    "held_out": HELD_OUT_KINDS,
    "foreign": FOREIGN_KINDS,
}
"""Kinds of each split; "val" has the kinds of "train" under other seeds."""

SEED_STRIDE = 3
"""World seeds of one number; fixed, so that the seeds of stored shards stay theirs."""

_ABANDONED_S = 86400.0
"""Age of an unfinished file that no job is taken to write any more."""

FORMAT = 2
"""Version of the shards' layout, in each manifest."""

GENERATOR = 15
"""Raised when worlds or futures of the same seed change: shards of two versions do not mix."""


# Reading ------------------------------------------------------------------------------------


def shard_files(folder: str | os.PathLike[str], split: str) -> list[Path]:
    """``SPLIT-NUMBER.tar``, in order; not those of a split whose name only begins alike."""
    name = re.compile(re.escape(split) + r"-\d+\.tar")
    return sorted(p for p in Path(folder).glob("*.tar") if name.fullmatch(p.name))


@dataclass(frozen=True)
class StoredSample:
    """One image with its futures. Shapes and frames as in `sim.flow`."""

    rgb: NDArray[np.uint8]  # [H, W, 3]
    depth: NDArray[np.float32]  # [H, W] metres, 0 = no surface
    bodies: NDArray[np.uint8]  # [H, W], 0 = static world
    intrinsics: NDArray[np.float64]  # K [3, 3]
    camera_pose: NDArray[np.float64]  # [4, 4]
    body_motion: NDArray[np.float32]  # [F, n, 4, 4]
    camera_motion: NDArray[np.float32]  # [F, 4, 4]
    causes: NDArray[np.int64]  # [F] parts chosen to move, see `sim.simulator.Future.causes`
    kind: str
    seed: int

    @property
    def futures(self) -> int:
        """Number of futures F."""
        return len(self.camera_motion)

    @property
    def moving(self) -> NDArray[np.bool_]:
        """[F, n] which bodies move in which future."""
        return moving_bodies(self.body_motion)

    @property
    def camera_static(self) -> NDArray[np.bool_]:
        """[F] futures without camera motion."""
        return ~moving_bodies(self.camera_motion)

    def flow_at(self, future: int, xy: NDArray[np.integer]) -> PointFlow:
        """True flow of a future at whole pixels `xy` [M, 2] (u, v)."""
        u, v = xy[:, 0], xy[:, 1]
        return point_flow(
            xy,
            self.depth[v, u],
            self.bodies[v, u],
            self.intrinsics,
            (self.depth.shape[0], self.depth.shape[1]),
            self.camera_pose,
            self.body_motion[future],
            self.camera_motion[future],
        )


def read_sample(members: Mapping[str, Any]) -> StoredSample:
    """Decodes one raw WebDataset sample (member name -> bytes); others such as __key__ are ignored.

    Raises:
        ValueError: a member is missing or damaged; the message names it.
    """

    def decoded(name: str, decode: Callable[[bytes], Any]) -> Any:
        if name not in members:
            raise ValueError(f"sample {key}: member {name!r} is missing, has {sorted(members)}")
        try:
            return decode(members[name])
        except (ValueError, EOFError, cv2.error) as error:
            raise ValueError(f"sample {key}: cannot decode {name}: {error}") from error

    key = members.get("__key__", "?")
    meta = decoded("meta.json", json.loads)
    depth = decoded("depth.png", partial(_picture, mode=cv2.IMREAD_UNCHANGED))
    try:
        return StoredSample(
            rgb=cv2.cvtColor(decoded("rgb.jpg", _picture), cv2.COLOR_BGR2RGB),
            depth=depth * np.float32(meta["depth_scale"]),
            bodies=decoded("bodies.png", partial(_picture, mode=cv2.IMREAD_UNCHANGED)),
            intrinsics=np.array(meta["intrinsics"]),
            camera_pose=np.array(meta["camera_pose"]),
            body_motion=decoded("body_motion.npy", _array),
            camera_motion=decoded("camera_motion.npy", _array),
            causes=np.array(meta["causes"], np.int64),
            kind=meta["kind"],
            seed=meta["seed"],
        )
    except KeyError as error:
        raise ValueError(f"sample {key}: meta.json lacks {error}, has {sorted(meta)}") from None


def _picture(data: bytes, mode: int = cv2.IMREAD_COLOR) -> NDArray:
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    if picture is None:
        raise ValueError(f"no picture that OpenCV reads, {len(data)} bytes")
    return picture


def _array(data: bytes) -> NDArray:
    return np.load(io.BytesIO(data), allow_pickle=False)


# Writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the contents of shards depend on, besides split and index.

    Raises ValueError for a number that is not positive and a probability beyond [0, 1].
    """

    size: int = 128  # pixels, width and height
    futures: int = 8  # an image
    images_per_world: int = 4  # a world is drawn anew (camera, state, looks) so often
    images_per_shard: int = 500
    camera_motion_probability: float = 0.15
    wide_probability: float = 0.0  # that joints go most of their way, see `Simulator.sample_future`

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name.endswith("_probability"):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name} must be in [0, 1], received {value}")
            elif value < 1:
                raise ValueError(f"{name} must be positive, received {value}")


class ShardError(Exception):
    """A fault while a shard was made, unlike a wrong argument; the message names the shard."""


def _encode(extension: str, picture: NDArray, *options: int) -> bytes:
    done, data = cv2.imencode(extension, picture, options)
    if not done:
        raise RuntimeError(f"cannot encode a picture of shape {picture.shape} as {extension}")
    return data.tobytes()


def _npy(array: NDArray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


class Simulated(NamedTuple):
    """An image of a split as it was drawn: what the stored sample is made of."""

    number: int
    seed: int
    world: Simulator
    frame: Frame
    futures: list[Future]


def simulate(
    split: str, first: int, count: int, settings: Settings, assets: Path | None = None
) -> Iterator[Simulated]:
    """Images `first` to `first + count - 1` of a split; `first` must be the first of its world.

    `world` is in the state of `frame` until the next image is asked for.
    """
    from sim.simulator import Simulator

    make: Callable[..., Simulator] = Simulator
    if assets is not None:
        from sim.foreign import ForeignSimulator

        make = partial(ForeignSimulator, assets=assets)
    kinds = SPLITS[split]
    world = None
    for i in range(count):
        number = first + i
        if i % settings.images_per_world == 0:
            kind = kinds[number // settings.images_per_world % len(kinds)]
            seed = number * SEED_STRIDE + list(SPLITS).index(split)
            rng = np.random.default_rng([seed, 1])
            world = make(kind, seed, (settings.size, settings.size))
        else:
            world.rerandomize(rng)
        frame = world.render()
        futures = [
            world.sample_future(rng, settings.camera_motion_probability, settings.wide_probability)
            for _ in range(settings.futures)
        ]
        yield Simulated(number, seed, world, frame, futures)


def replay(split: str, number: int, settings: Settings) -> Simulated:
    """Draws one image of a split again, for what is not stored: a second rendering, for example.

    Needs MuJoCo and OpenGL; not for "foreign".
    """
    in_shard = number % settings.images_per_shard
    before = in_shard % settings.images_per_world
    *_, last = simulate(split, number - before, before + 1, settings)
    return last


def generate(
    split: str, shard: int, settings: Settings, assets: Path | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of a shard as WebDataset dictionaries; `assets` is for "foreign" alone."""
    first = shard * settings.images_per_shard
    for drawn in simulate(split, first, settings.images_per_shard, settings, assets):
        number, seed, world, frame, futures = drawn
        # 16 bits over each image's own range: the nearest surfaces keep about three digits
        depth_scale = max(float(frame.depth.max()), 1e-3) / 65535
        meta = {
            "kind": world.kind,
            "seed": seed,
            "depth_scale": depth_scale,
            "intrinsics": frame.intrinsics.tolist(),
            "camera_pose": frame.camera_pose.tolist(),
            "descriptions": [future.description for future in futures],
            "causes": [future.causes for future in futures],
        }
        yield {
            "__key__": f"{split}-{number:08d}",
            "rgb.jpg": _encode(".jpg", frame.rgb[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 95),
            "depth.png": _encode(
                ".png",
                np.rint(frame.depth / depth_scale).astype(np.uint16),
                cv2.IMWRITE_PNG_COMPRESSION,
                1,
            ),
            "bodies.png": _encode(".png", frame.bodies, cv2.IMWRITE_PNG_COMPRESSION, 3),
            "body_motion.npy": _npy(np.stack([f.body_motion for f in futures])),
            "camera_motion.npy": _npy(np.stack([f.camera_motion for f in futures])),
            "meta.json": json.dumps(meta).encode(),
        }


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_Job = tuple[Path, str, int, Settings, Path | None]
"""Of one shard: its folder, split, number and settings, and the assets of "foreign"."""


def _write_shard(job: _Job) -> int:
    """Writes one shard unless it is there already; returns its number of images."""
    import webdataset

    out, split, shard, settings, assets = job
    path = out / f"{split}-{shard:06d}.tar"
    note = path.with_suffix(".json")
    if not _finished(path, note, settings):
        with _whole_or_not(path) as unfinished:
            with webdataset.TarWriter(
                str(unfinished), user="fpt", group="fpt", mtime=0.0
            ) as writer:
                done = 0
                try:
                    for sample in generate(split, shard, settings, assets):
                        writer.write(sample)
                        done += 1
                except Exception as error:  # MuJoCo's and OpenCV's have no base class of their own
                    raise ShardError(
                        f"{path.name}, image {done}: {type(error).__name__}: {error}"
                    ) from error
            record = {
                "file": path.name,
                "images": settings.images_per_shard,
                "bytes": unfinished.stat().st_size,
                "sha256": sha256(unfinished),
                **_recipe(settings),
            }
            # before the shard is in its place: none is there that no manifest can list
            _write_text(note, json.dumps(record))
    return settings.images_per_shard


def _use_one_thread() -> None:
    """The processes are the parallelism, also for Mesa's renderer."""
    cv2.setNumThreads(1)
    os.environ.setdefault("LP_NUM_THREADS", "0")


def _start_worker() -> None:
    """Of a worker process: it ends with the one that started it, however that ends."""
    _use_one_thread()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    def end(*_: object) -> None:
        # an exception would end the shard alone, and the next one would begin
        for unfinished in _UNFINISHED:
            unfinished.unlink(missing_ok=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    Thread(target=watch, daemon=True).start()


_UNFINISHED: set[Path] = set()
"""What this process is writing."""


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """What to write in place of ``path``, which it becomes at the end; removed on failure.

    Each process has its own: another that writes the same, such as a job that was queued again
    too early, must not write into it.
    """
    name = f"{path.name}.{uuid.uuid4().hex}.partial"  # jobs of several machines share folders
    unfinished = path.with_name(name)
    _UNFINISHED.add(unfinished)
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # or after a power failure the name may stand for nothing
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        _UNFINISHED.remove(unfinished)


def _write_text(path: Path, text: str) -> None:
    """Atomically: other jobs read it, and a full disk must not leave half of it."""
    with _whole_or_not(path) as unfinished:
        unfinished.write_text(text)


def _recipe(settings: Settings) -> dict[str, Any]:
    """What makes two shards of the same index equal."""
    return {
        "generator": GENERATOR,
        "settings": asdict(settings),
        "mujoco": metadata.version("mujoco"),  # whose solver decides where what is pushed ends
    }


def _read_note(note: Path) -> dict[str, Any]:
    """What is written beside a shard; ValueError names a damaged one."""
    try:
        record = json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(
            f"{note} is damaged: {error}; remove it, and its shard is redone"
        ) from None
    if not (isinstance(record, dict) and {"file", "images", "sha256"} <= record.keys()):
        raise ValueError(f"{note} is no note of a shard; remove it, and its shard is redone")
    return record


def _finished(path: Path, note: Path, settings: Settings) -> bool:
    if not (path.exists() and note.exists()):
        return False
    wanted = _recipe(settings)
    record = _read_note(note)
    found = {key: record.get(key) for key in wanted}
    if found != wanted:
        raise ValueError(f"{path} was made with {found}, not {wanted}: choose another --out")
    size = path.stat().st_size
    if size != record.get("bytes", size):
        raise ValueError(
            f"{path} has {size} bytes, its note says {record['bytes']}: remove it, and it is redone"
        )
    return True


def write_manifest(out: Path, split: str, shards: int) -> dict[str, Any]:
    """Gathers the finished shards of a split in manifest-<split>.json and returns its contents.

    All that are there are listed; it is complete with the first ``shards`` of them.

    Raises:
        ValueError: the shards' generators or settings differ.
    """
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or a job that read less might write last
        return _write_manifest(out, split, shards)
    finally:
        os.close(lock)


def _write_manifest(out: Path, split: str, shards: int) -> dict[str, Any]:
    beside = (tar.with_suffix(".json") for tar in shard_files(out, split))
    notes = [note for note in beside if note.exists()]
    records = [_read_note(note) for note in notes]
    first = records[0] if records else {}
    # up to generator 12 they do not tell MuJoCo's version
    recipe = {key: first.get(key) for key in ("generator", "settings", "mujoco")}
    for note, record in zip(notes, records, strict=True):
        for key, value in recipe.items():
            if record.get(key) != value:
                raise ValueError(
                    f"{out} mixes shards: {notes[0].name} has {key} {value}, {note.name} has "
                    f"{record.get(key)}"
                )
    manifest = {
        "format": FORMAT,
        "split": split,
        "kinds": SPLITS[split],
        "complete": {f"{split}-{i:06d}.tar" for i in range(shards)} <= {r["file"] for r in records},
        "images": sum(r["images"] for r in records),
        **recipe,
        "shards": [{k: r[k] for k in ("file", "images", "sha256")} for r in records],
    }
    _write_text(out / f"manifest-{split}.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def write_dataset(
    out: Path,
    split: str,
    images: int,
    settings: Settings | None = None,
    workers: int = 1,
    job: tuple[int, int] = (0, 1),
    assets: Path | None = None,
) -> dict[str, Any]:
    """Writes the shards of a split that are not there yet; returns the manifest.

    Args:
        out: directory, made if needed.
        images: wanted, rounded up to whole shards.
        workers: processes.
        job: (i, n): only each n-th shard from i on, for job arrays.
        assets: folder of the packages that the split "foreign", and no other, is made of.

    Raises:
        ValueError: unknown split, bad numbers, shards of other settings in `out`, or `assets`
            missing or not needed.
        ShardError: the simulation failed.
        FileNotFoundError: `assets` lacks a package.
    """
    from tqdm import tqdm

    settings = settings or Settings()
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {tuple(SPLITS)}")
    if images < 1 or workers < 1:
        raise ValueError(f"images and workers must be positive, got {images} and {workers}")
    if not 0 <= job[0] < job[1]:
        raise ValueError(f"job must be (i, n) with 0 <= i < n, got {job}")
    if (assets is None) == (split == "foreign"):
        raise ValueError(f'split "foreign" alone needs assets, got {assets} for {split!r}')
    if assets is not None:
        from sim.foreign import check_assets

        check_assets(assets)
    out.mkdir(parents=True, exist_ok=True)
    for unfinished in out.glob(f"{split}-*.partial"):  # of a process that was killed
        with suppress(FileNotFoundError):  # another job was faster, or has finished it
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
                unfinished.unlink()
    shards = -(-images // settings.images_per_shard)
    jobs = [(out, split, i, settings, assets) for i in range(job[0], shards, job[1])]
    total = len(jobs) * settings.images_per_shard
    try:
        with tqdm(total=total, unit="image", desc=split, smoothing=0.05) as progress:
            for images_done in _written(jobs, workers):
                progress.update(images_done)
    except ValueError:  # what is there is of another making, and not to be touched
        raise
    except BaseException:
        # what was added must be listed, or training refuses all that is there
        with suppress(OSError, ValueError):
            write_manifest(out, split, shards)
        raise
    return write_manifest(out, split, shards)


def _written(jobs: list[_Job], workers: int) -> Iterator[int]:
    """Writes the shards; yields each one's number of images as it is done."""
    if workers == 1:
        yield from map(_write_shard, jobs)
        return
    # Fresh processes: OpenGL contexts do not survive a fork.
    # Of a pool whose process was killed (out of memory) this one raises BrokenProcessPool.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for done in as_completed([pool.submit(_write_shard, item) for item in jobs]):
                yield done.result()
        except BaseException as error:
            if not isinstance(error, Exception):  # a signal: whoever sent it does not wait long
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def verify(out: Path, split: str) -> None:
    """Compares the checksums of a split's manifest with its files; ValueError names differences."""
    manifest = json.loads((out / f"manifest-{split}.json").read_text())
    for record in manifest["shards"]:
        if not (out / record["file"]).is_file():
            raise ValueError(f"{out / record['file']} is missing, the manifest lists it")
        found = sha256(out / record["file"])
        if found != record["sha256"]:
            raise ValueError(
                f"{out / record['file']} has sha256 {found}, the manifest says "
                f"{record['sha256']}: remove it, and it is redone"
            )


def _job(text: str) -> tuple[int, int]:
    try:
        i, n = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected i:n such as 0:4, got {text!r}") from None
    return i, n


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()
    parser.add_argument("--out", type=Path, required=True, help="directory for the shards")
    parser.add_argument("--split", choices=tuple(SPLITS), required=True)
    parser.add_argument("--images", type=int, required=True, help="rounded up to whole shards")
    parser.add_argument("--size", type=int, default=default.size, help="side in pixels")
    parser.add_argument("--futures", type=int, default=default.futures, help="per image")
    parser.add_argument("--images-per-world", type=int, default=default.images_per_world)
    parser.add_argument("--images-per-shard", type=int, default=default.images_per_shard)
    parser.add_argument(
        "--camera-motion",
        type=float,
        default=default.camera_motion_probability,
        help="share of futures with a moving camera",
    )
    parser.add_argument(
        "--wide",
        type=float,
        default=default.wide_probability,
        help="share of futures whose joints go most of their way; for training",
    )
    parser.add_argument("--assets", type=Path, help='packages for "foreign", see sim.foreign')
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument(
        "--shards", type=_job, default=(0, 1), metavar="i:n", help="each n-th shard from i on"
    )
    parser.add_argument(
        "--verify", action="store_true", help="check the files' checksums at the end"
    )
    args = parser.parse_args()
    _use_one_thread()
    # as Ctrl-C: nothing half done is left, and what is done is listed
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        settings = Settings(
            size=args.size,
            futures=args.futures,
            images_per_world=args.images_per_world,
            images_per_shard=args.images_per_shard,
            camera_motion_probability=args.camera_motion,
            wide_probability=args.wide,
        )
        manifest = write_dataset(
            args.out, args.split, args.images, settings, args.workers, args.shards, args.assets
        )
        if args.verify:
            verify(args.out, args.split)
    except (ValueError, OSError, ShardError, BrokenProcessPool) as error:
        sys.exit(str(error))
    state = "complete" if manifest["complete"] else "not yet complete"
    print(f"{args.out}: {manifest['images']} {args.split} images, {state}")


if __name__ == "__main__":
    main()
