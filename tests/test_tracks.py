# SPDX-License-Identifier: MIT
"""Tracked videos: a patch that moves over a textured ground, from video file to example."""

import io
import json
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset
from node_harness import save_small_model

from fpt_model.config import FPTConfig
from fpt_model.geometry import grid, normalised_to_pixels, pixels_to_normalised
from fpt_ros.cli import main
from sim.dataset import Settings, write_dataset
from training import tracks
from training.config import DataConfig, RunConfig
from training.data import ExampleDataset, Shards, UnusableSample, random_crop
from training.evaluation.scenes import scenes
from training.evaluation.suite import Suite
from training.tracks import (
    MIN_TRACKS,
    TrackedClip,
    TrackShards,
    lucas_kanade,
    open_shards,
    write_clips,
)

HEIGHT, WIDTH, FPS = 96, 128, 10
SPEED = 2  # px a frame, to the right
PLAIN = DataConfig(visible_pokes=(0, 1, 3), queries_per_group=4, horizon_frames=10)


def textured(seed: int, height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4), np.uint8)
    grey = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([grey, grey, grey // 2], -1)


def picture(t: int) -> np.ndarray:
    """RGB: a patch of 40 x 48 px whose left edge is at 20 + SPEED t."""
    image = textured(0, HEIGHT, WIDTH)
    left = 20 + SPEED * t
    image[30:70, left : left + 48] = textured(1, 40, 48)
    return image


def on_patch(xy: np.ndarray, margin: float) -> np.ndarray:
    """Of frame 0, points inside by at least ``margin`` px."""
    low, high = np.array([20, 30]) + margin, np.array([67, 69]) - margin
    return ((xy >= low) & (xy <= high)).all(-1)


def in_its_way(xy: np.ndarray) -> np.ndarray:
    """Ground that the patch comes to lie on within ten frames, or is near to doing so."""
    return ((xy >= [50, 20]) & (xy <= [110, 80])).all(-1) & ~on_patch(xy, 0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "patch.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (WIDTH, HEIGHT))
    for t in range(23):
        writer.write(cv2.cvtColor(picture(t), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


@pytest.fixture(scope="module")
def folder(video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tracks")
    tracks.main([str(video), "--out", str(out), "--split", "clips", "--grid", "24"])
    return out


def test_points_are_followed_or_lost() -> None:
    frames = [cv2.cvtColor(picture(t), cv2.COLOR_RGB2GRAY) for t in range(11)]
    xy = normalised_to_pixels(grid((24, 24)), (HEIGHT, WIDTH))
    found = lucas_kanade(frames, xy)
    assert found.shape == (11, 576, 2)
    patch, ground = on_patch(xy, 12), ~on_patch(xy, -12) & ~in_its_way(xy)
    for points, speed in ((patch, SPEED), (ground, 0)):
        expected = xy[points] + np.arange(11)[:, None, None] * [speed, 0]
        error = np.linalg.norm(found[:, points] - expected, axis=-1)
        assert np.isfinite(error[-1]).mean() > 0.9
        assert np.nanmax(error) < 0.3
    covered = ((xy >= [74, 36]) & (xy <= [82, 64])).all(-1)  # at the end by 6 px and more
    assert np.isnan(found[-1, covered]).mean() > 0.8, "some are swept along by the edge"
    lost = np.isnan(found).any(-1)
    assert (np.diff(lost.astype(int), axis=0) >= 0).all(), "what is lost stays so"


def test_clips_are_read_as_they_were(folder: Path, video: Path) -> None:
    shards = open_shards(folder, "clips")
    assert isinstance(shards, TrackShards)
    assert len(shards) == 2
    for number, clip in enumerate(shards[i] for i in range(2)):
        assert clip.source == "patch.avi"
        assert len(clip) == FPS + 1
        for t in (0, 7):
            shown = clip.frame(t).astype(int)
            assert np.abs(shown - picture(10 * number + t)).mean() < 12, "but for two JPEGs"
    motion = shards[0].motion(0, 10, (HEIGHT, WIDTH))
    moving = on_patch(motion.xy, 12)
    assert motion.known[moving].mean() > 0.9
    flow = motion.flow[moving & motion.known]
    assert np.abs(flow - [10 * SPEED / WIDTH, 0]).max() < 0.5 / WIDTH
    assert motion.camera_static
    assert json.loads(shards.read(1, "meta.json"))["frame"] == 10
    with pytest.raises(ValueError, match="has 11 frames, its tracks 12"):
        replace(shards[0], tracks=np.zeros((12, 4, 2))).frame(11)


def test_examples_show_the_tracks(folder: Path) -> None:
    """On the whole picture: positions are tracked ones, motions theirs; what is unknown is NaN."""
    clip = open_shards(folder, "clips")[0]
    motion = clip.motion(0, 10, (HEIGHT, WIDTH))
    places = pixels_to_normalised(motion.xy, (HEIGHT, WIDTH))
    config = replace(
        PLAIN.without_augmentation(), futures_per_image=3, segment_points=5, poke_on_moving=1.0
    )
    unknown = 0
    for seed in range(5):
        example = tracks.make_example(clip, 32, config, np.random.default_rng(seed))
        assert example.image.shape == (3, 32, 32)
        assert example.query_pos.shape == (3, 3, 4, 2)
        assert example.camera_static.all()
        assert not example.segment_body.any()
        for pos, flow in (
            (example.poke_pos.flatten(0, 1), example.poke_flow.flatten(0, 1)),
            (example.query_pos.flatten(0, 2), example.query_flow.flatten(0, 2)),
        ):
            distance = np.linalg.norm(places - pos.numpy()[:, None], axis=-1)
            assert distance.min(-1).max() < 1e-6
            true = motion.flow[distance.argmin(-1)]
            assert np.allclose(flow.numpy(), true, atol=1e-6, equal_nan=True)
            unknown += int(flow.isnan().any(-1).sum())
        assert not example.poke_flow.isnan().any(), "pokes are known"
    assert unknown > 0


def test_cropped_examples_move_as_the_crop_does(folder: Path) -> None:
    clip = open_shards(folder, "clips")[0]
    config = replace(PLAIN, target_noise=0, poke_noise=0, flip=1.0, quarter_turn=0, informed=1)
    shifts = []
    for seed in range(20):
        example = tracks.make_example(clip, 32, config, np.random.default_rng(seed))
        shifts += [f for f in example.poke_flow.flatten(0, 1).numpy() if abs(f[0]) > 0.02]
        known = example.query_pos[~example.query_flow.isnan().any(-1)]
        assert ((known >= 0) & (known <= 1)).all()
    across, down = np.transpose(shifts)
    # mirrored: to the left, by 20 of 64 to 128 px
    assert ((across > -20 / 64 - 0.01) & (across < -20 / 128 + 0.01)).mean() > 0.9
    assert np.median(np.abs(down)) < 0.01


def test_models_that_see_a_square_are_trained_on_squares(folder: Path) -> None:
    """So that what moves by the same px is as fast across as down, as when they are asked."""
    config = replace(PLAIN, target_noise=0, poke_noise=0, flip=0, quarter_turn=0, informed=1)
    model = FPTConfig(image_size=28, fit="crop")
    shards = open_shards(folder, "clips")
    for seed in range(8):
        crop = random_crop((HEIGHT, WIDTH), config, np.random.default_rng(seed), square=True)
        assert crop.width == crop.height <= HEIGHT
        example = shards.example(0, model, config, np.random.default_rng(seed))
        fast = example.poke_flow[..., 0].max()
        assert 20 / HEIGHT - 0.01 < fast < 20 / (config.min_crop * HEIGHT) + 0.01


def write_public(path: Path, frames: int = 14, broken: bool = True) -> np.ndarray:
    """A shard as the public pipeline's: MPEG-1, and points that all shift by 3 px a frame.

    With ``broken`` a second sample has no visibility.
    """
    size, count = 64, 40
    file = path.with_suffix(".mpg")
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"PIM1"), 25, (size, size))
    for _ in range(frames):
        writer.write(textured(2, size, size))
    writer.release()
    start = np.random.default_rng(0).uniform(5, 20, (count, 2))
    xy = (start + np.arange(frames)[:, None, None] * [3, 0]) / size
    visible = np.ones((frames, count), bool)
    visible[8:, 0] = False  # hidden later on, and still followed
    visible[:, 1] = False

    def npy(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    with webdataset.TarWriter(str(path)) as tar:
        members = {"tracks.npy": npy(xy.astype(np.float32)), "visibility.npy": npy(visible)}
        tar.write({"__key__": "a_0", "video.mpg": file.read_bytes(), **members})
        if broken:
            tar.write({"__key__": "a_1", "video.mpg": file.read_bytes(), "tracks.npy": npy(xy)})
    return xy


def test_public_shards_are_read(tmp_path: Path) -> None:
    xy = write_public(tmp_path / "train-000000.tar")
    shards = open_shards(tmp_path, "train")
    assert isinstance(shards, TrackShards)
    motion = shards[0].motion(2, 10, (64, 64))
    assert len(motion.xy) == 39, "what is not seen at the start is not there"
    assert np.allclose(motion.xy, xy[2, [0, *range(2, 40)]] * 64, atol=1e-4)
    assert np.allclose(motion.flow, [24 / 64, 0], atol=1e-6), "with the one that is hidden later"
    assert not motion.camera_static
    example = shards.example(0, FPTConfig(), PLAIN, np.random.default_rng(0))
    assert not example.camera_static.any()
    with pytest.raises(ValueError, match=r"train-000000.tar, sample 1: expected video.*visibility"):
        shards[1]
    config = replace(PLAIN, horizon_frames=25)
    with pytest.raises(ValueError, match=r"has 14 frames, too few for data\.horizon_frames = 25"):
        shards.example(0, FPTConfig(), config, np.random.default_rng(0))


def test_unusable_clips_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run goes on with the others, and names them; it ends if none is of use."""
    for number, frames in enumerate((14, 8)):
        write_public(tmp_path / f"train-{number:06d}.tar", frames, broken=False)
    config = RunConfig(data=PLAIN)
    shards = open_shards(tmp_path, "train")
    dataset, again = (ExampleDataset(shards, config) for _ in range(2))
    examples = [dataset[number] for number in range(8)]
    records = {id(r): r.getMessage() for r in caplog.records}  # a handler may stand twice
    (told,) = records.values()
    assert told.startswith("no example of sample 1, another is taken: a clip of train-000001 has 8")
    for number in (5, 2):  # whatever was drawn before
        assert torch.equal(again[number].image, examples[number].image)
    (tmp_path / "train-000000.tar").rename(tmp_path / "train-000002.tar")  # after the short one
    suite = replace(Suite.load("clips"), horizon_frames=10, pokes=(1,))
    caplog.clear()
    (scene,) = scenes(open_shards(tmp_path, "train"), suite, 0)
    assert scene.kind == "train-000002"
    assert "a clip of train-000001 is left out: it has 8 frames" in caplog.text
    caplog.clear()
    assert not list(scenes(open_shards(tmp_path, "train"), replace(suite, pokes=(1, 500)), 0))
    assert "points are tracked to its end, expected more than the suite's 500 pokes" in (
        caplog.text.replace("of its points", "points")
    )
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(
        UnusableSample, match="256 samples in a row are of no use, the last: a clip"
    ):
        ExampleDataset(open_shards(tmp_path, "train"), config)[0]


@pytest.mark.parametrize("folder", ["", "./", "set.v1/", "./set.v1/a/"])
def test_samples_are_told_apart_whatever_folder_they_are_in(tmp_path: Path, folder: str) -> None:
    """As WebDataset does: a sample is named up to the first dot of the file's name."""
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        if folder:
            directory = tarfile.TarInfo(folder)
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
        for key in ("000", "001"):
            for part in ("video.avi", "tracks.npy", "visibility.npy"):
                tar.addfile(tarfile.TarInfo(f"{folder}{key}.{part}"))
    shards = open_shards(tmp_path, "train")
    assert isinstance(shards, TrackShards)
    assert [shards.members(i) for i in range(len(shards))] == [
        {"video.avi", "tracks.npy", "visibility.npy"}
    ] * 2


def test_many_points_are_followed() -> None:
    """OpenCV maps fewer than 32,768 rows at once."""
    frames = [cv2.cvtColor(picture(t), cv2.COLOR_RGB2GRAY) for t in range(2)]
    xy = normalised_to_pixels(grid((200, 200)), (HEIGHT, WIDTH))
    found = lucas_kanade(frames, xy)
    some = np.arange(0, len(xy), 97)
    np.testing.assert_allclose(found[:, some], lucas_kanade(frames, xy[some]), atol=1e-3)


def test_simulated_shards_are_told_apart(tmp_path: Path) -> None:
    write_dataset(tmp_path, "val", 1, Settings(size=16, futures=1, images_per_shard=1))
    assert type(open_shards(tmp_path, "val")) is Shards
    with pytest.raises(FileNotFoundError, match=r"no shards train-NUMBER.tar"):
        open_shards(tmp_path, "train")


def test_a_split_does_not_hold_those_whose_names_begin_alike(video: Path, tmp_path: Path) -> None:
    for split in ("val", "val-test"):
        write_clips(video, tmp_path / f"{split}-000000.tar")
    for split in ("val", "val-test"):
        assert [f.name for f in open_shards(tmp_path, split).files] == [f"{split}-000000.tar"]


def test_an_example_begins_where_enough_is_seen(video: Path, tmp_path: Path) -> None:
    shard = tmp_path / "train-000000.tar"
    write_clips(video, shard)
    clip = open_shards(tmp_path, "train")[0]
    assert isinstance(clip, TrackedClip)
    later = 10 - 4
    clip.visible[:later] = False
    config = replace(PLAIN, horizon_frames=4)
    for seed in range(8):
        example = tracks.make_example(clip, 32, config, np.random.default_rng(seed))
        assert example.image.shape[-1] == 32
    clip.visible[:] = False
    with pytest.raises(ValueError, match=r"no frame of a clip of patch.avi has \d+ tracks"):
        tracks.make_example(clip, 32, config, np.random.default_rng(0))


def test_videos_of_odd_size_keep_their_tracks(tmp_path: Path) -> None:
    path = tmp_path / "odd.avi"
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (101, 75))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), FPS, (101, 75))
    if not writer.isOpened():
        pytest.skip("OpenCV writes no FFV1, which keeps odd sizes")
    for _ in range(12):
        writer.write(picture)
    writer.release()
    write_clips(path, tmp_path / "odd-000000.tar", side=8)
    clip = open_shards(tmp_path, "odd")[0]
    assert isinstance(clip, TrackedClip)
    assert clip.frame(0).shape == (74, 100, 3)
    first = normalised_to_pixels(grid((8, 8)), (74, 100))[0]
    np.testing.assert_allclose(clip.tracks[0, 0] * [100, 74], first, atol=1e-4)


def test_another_trackers_output_is_taken(video: Path, tmp_path: Path) -> None:
    given = np.random.default_rng(0).uniform(0, 90, (23, 50, 2)).astype(np.float32)
    visible = np.ones((23, 50), bool)
    files = [tmp_path / "tracks.npy", tmp_path / "visibility.npy"]
    for file, array in zip(files, (given, visible), strict=True):
        np.save(file, array)
    options = ["--tracks", str(files[0]), "--visibility", str(files[1])]
    tracks.main([str(video), "--out", str(tmp_path), "--split", "other", *options])
    clip = open_shards(tmp_path, "other")[1]
    assert np.allclose(clip.tracks * [WIDTH, HEIGHT], given[10:21], atol=1e-4)
    again = [str(video), "--out", str(tmp_path), "--split", "other", *options]
    with pytest.raises(SystemExit, match=r"other-000000.tar exists already"):
        tracks.main(again)
    tracks.main([*again, "--append"])
    assert len(open_shards(tmp_path, "other").files) == 2
    np.save(files[1], np.full((23, 50), 0.7))
    with pytest.raises(ValueError, match=r"true or false \(1, 0\), received 0.7"):
        write_clips(video, tmp_path / "x-000000.tar", given=(files[0], files[1]))
    np.save(files[0], given[:20])
    np.save(files[1], visible)
    with pytest.raises(ValueError, match=r"expected tracks \[T, N, 2\].*\[20, 50, 2\]"):
        write_clips(video, tmp_path / "x-000000.tar", given=(files[0], files[1]))
    np.save(files[1], visible[:20])
    with pytest.raises(ValueError, match="has 20 frames, the video 23"):
        write_clips(video, tmp_path / "x-000000.tar", given=(files[0], files[1]))


def test_videos_that_cannot_be_tracked_are_named(
    video: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FileExistsError, match=r"clips-000000.tar exists already"):
        write_clips(video, folder / "clips-000000.tar")
    grey = tmp_path / "grey.avi"
    writer = cv2.VideoWriter(str(grey), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (WIDTH, HEIGHT))
    for _ in range(12):
        writer.write(np.full((HEIGHT, WIDTH, 3), 128, np.uint8))
    writer.release()
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match=f"no clip of .*grey.avi has {MIN_TRACKS} points"):
        write_clips(grey, tmp_path / "grey-000000.tar")
    assert "left out 1 clips" in caplog.text
    assert not list(tmp_path.glob("grey-*"))
    with pytest.raises(SystemExit, match=r"1 of 2 videos failed:\nno clip of .*grey.avi"):
        tracks.main([str(grey), str(video), "--out", str(tmp_path), "--split", "two"])
    assert [file.name for file in tmp_path.glob("two-*")] == ["two-000001.tar"]


def test_clips_are_evaluated_by_a_suite_of_ones_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One YAML file is all that it takes."""
    write_dataset(folder, "val", 4, Settings(size=64, images_per_shard=4, images_per_world=1))
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        "title: Mine\nsplits: [clips]\nmake: track {data} {split}\npokes: [1, 3]\ngrid: 32\n"
    )
    model = save_small_model(tmp_path / "small.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("eval", "--suite", str(suite), "--data", str(folder), "--model", str(model)),
                *("--out", str(tmp_path / "out")),
            ]
        )
    assert ended.value.code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "figures.json").read_text())["splits"]["clips"]
    assert found["scenes"] == 2
    assert list(found["largest"]["by_kind"]) == ["patch.avi"]
    assert list(found["curve"]) == ["1", "3"]
    # the patch moves by 20 of 128 px: 5 of 32 cells
    assert found["largest"]["epe_moving"]["no_motion"] == pytest.approx(5, abs=0.3)
    assert found["largest"]["epe_moving"]["copy"] < 0.2
    assert "camera" not in found
    assert cv2.imread(str(tmp_path / "out" / "clips-scenes.png")).std() > 5
