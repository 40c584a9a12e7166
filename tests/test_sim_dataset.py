# SPDX-License-Identifier: MIT
"""Shards: round trip, determinism, resuming, checksums, splits."""

import json
import multiprocessing
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from node_harness import wait_until

from sim import HELD_OUT_KINDS, TRAIN_KINDS, dataset
from sim.dataset import Settings
from training.data import Shards

SMALL = Settings(size=64, futures=3, images_per_world=2, images_per_shard=6)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    manifest = dataset.write_dataset(out, "train", 12, SMALL)
    return out, manifest


def test_manifest_lists_shards_with_checksums(written):
    out, manifest = written
    assert manifest["complete"]
    assert manifest["images"] == 12
    assert [r["file"] for r in manifest["shards"]] == ["train-000000.tar", "train-000001.tar"]
    dataset.verify(out, "train")


def test_samples_decode_to_what_the_simulator_made(written):
    out, _ = written
    shards = Shards(out, "train")
    stored = [shards[index] for index in range(6, 12)]
    made = list(dataset.generate("train", 1, SMALL))
    assert len(stored) == len(made) == 6
    from sim import Simulator

    sample = stored[0]
    frame = Simulator(sample.kind, sample.seed, (64, 64)).render()
    assert np.abs(sample.rgb.astype(int) - frame.rgb).mean() < 4  # JPEG
    np.testing.assert_array_equal(sample.bodies, frame.bodies)
    np.testing.assert_allclose(sample.depth, frame.depth, atol=frame.depth.max() / 65535)
    np.testing.assert_allclose(sample.camera_pose, frame.camera_pose)
    assert sample.futures == len(sample.body_motion) == len(sample.causes) == 3
    assert [s.causes.any() for s in stored] == [(s.moving.any()) for s in stored]
    xy = np.argwhere(sample.bodies >= 0)[:, ::-1]
    for f in range(sample.futures):
        result = sample.flow_at(f, xy)
        still = ~sample.moving[f][sample.bodies[xy[:, 1], xy[:, 0]]]
        if sample.camera_static[f]:
            assert np.all(result.flow[still] == 0)
        assert np.abs(result.flow).max() < 2


def test_shards_do_not_depend_on_when_or_where_they_are_made(written, tmp_path):
    _, manifest = written
    again = dataset.write_dataset(tmp_path, "train", 12, SMALL, job=(1, 2))
    assert not again["complete"]
    assert again["shards"] == manifest["shards"][1:]
    assert (
        dataset.write_dataset(tmp_path, "train", 12, SMALL, job=(0, 2))["shards"]
        == (manifest["shards"])
    )


def test_finished_shards_are_kept_and_missing_ones_made(written):
    out, manifest = written
    first, second = (out / r["file"] for r in manifest["shards"])
    stamp = first.stat().st_mtime_ns
    second.unlink()
    assert dataset.write_dataset(out, "train", 12, SMALL) == manifest
    assert first.stat().st_mtime_ns == stamp
    assert second.exists()


def test_fewer_images_than_are_there_keep_the_manifest_whole(tmp_path):
    settings = replace(SMALL, size=16, images_per_shard=1, images_per_world=1)
    manifest = dataset.write_dataset(tmp_path, "train", 2, settings)
    assert dataset.write_dataset(tmp_path, "train", 1, settings) == manifest
    assert len(Shards(tmp_path, "train")) == 2
    (tmp_path / "train-000000.tar").unlink()
    assert not dataset.write_manifest(tmp_path, "train", 2)["complete"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3 + [".tar"]


def test_what_an_extension_that_fails_has_added_is_listed(tmp_path, monkeypatch):
    settings = replace(SMALL, size=16, images_per_shard=1, images_per_world=1)
    dataset.write_dataset(tmp_path, "train", 1, settings)
    generate = dataset.generate

    def failing(split, shard, *rest):
        if shard == 2:
            raise OSError("no space left")
        return generate(split, shard, *rest)

    monkeypatch.setattr(dataset, "generate", failing)
    with pytest.raises(dataset.ShardError, match=r"train-000002\.tar, image 0: OSError: no space"):
        dataset.write_dataset(tmp_path, "train", 4, settings)
    assert len(Shards(tmp_path, "train")) == 2
    assert not json.loads((tmp_path / "manifest-train.json").read_text())["complete"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path, number):
    arguments = ["--split", "train", "--images", "400", "--images-per-shard", "2", "--size", "16"]
    arguments += ["--workers", "2", "--images-per-world", "1", "--out", str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-m", "sim.dataset", *arguments])
    try:
        wait_until(lambda: list(tmp_path.glob("*.tar")), 60.0)
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        children = [int(pid) for pid in listed.split()]
        assert len(children) >= 2
        parent.send_signal(number)
        code = parent.wait(60)
    finally:
        parent.kill()

    def ended(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(lambda: all(map(ended, children)), 30.0)
    if number == signal.SIGTERM:
        assert code == 128 + number
        assert not list(tmp_path.glob("*.partial"))
        listed = json.loads((tmp_path / "manifest-train.json").read_text())["shards"]
        assert len(listed) == len(list(tmp_path.glob("*.tar"))) < 200


def test_two_processes_that_make_one_shard_do_not_mix(tmp_path, monkeypatch):
    """As when a job is queued again while it still runs."""
    settings = replace(SMALL, size=16, images_per_shard=2, images_per_world=1)
    generate, context = dataset.generate, multiprocessing.get_context("spawn")
    other = context.Process(target=dataset.write_dataset, args=(tmp_path, "train", 2, settings))

    def interrupted(*arguments):
        for number, sample in enumerate(generate(*arguments)):
            if number == 1:
                other.start()
                other.join(120)
            yield sample

    monkeypatch.setattr(dataset, "generate", interrupted)
    try:
        manifest = dataset.write_dataset(tmp_path, "train", 2, settings)
        assert other.exitcode == 0
    finally:
        other.kill()
    assert manifest["complete"]
    dataset.verify(tmp_path, "train")
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_in_the_same_place_are_refused(written):
    out, _ = written
    with pytest.raises(ValueError, match="choose another --out"):
        dataset.write_dataset(out, "train", 12, Settings(size=32, images_per_shard=6))


def test_the_manifest_tells_the_shards_generator_and_refuses_mixtures(tmp_path):
    settings = Settings(size=16, futures=1, images_per_world=1, images_per_shard=1)
    dataset.write_dataset(tmp_path, "train", 2, settings)
    notes = [tmp_path / f"train-{i:06d}.json" for i in range(2)]
    older = [{**json.loads(note.read_text()), "generator": 1} for note in notes]
    notes[0].write_text(json.dumps(older[0]))
    with pytest.raises(ValueError, match=r"mixes shards: .* generator 1, .* has"):
        dataset.write_manifest(tmp_path, "train", 2)
    for note, record in zip(notes, older, strict=True):
        del record["mujoco"]  # as they were then
        note.write_text(json.dumps(record))
    assert dataset.write_manifest(tmp_path, "train", 2)["mujoco"] is None
    notes[1].write_text(json.dumps(older[1]))
    assert dataset.write_manifest(tmp_path, "train", 2)["generator"] == 1
    notes[1].write_text(json.dumps({**older[1], "mujoco": "0.1"}))
    with pytest.raises(ValueError, match=r"mixes shards: .* mujoco .*, .* has 0\.1"):
        dataset.write_manifest(tmp_path, "train", 2)


def test_job_arrays_by_the_command_line(written, tmp_path, monkeypatch, capsys):
    """As two jobs that each make one of two shards; the second one checks the checksums."""
    _, manifest = written
    common = "--out", tmp_path, "--split", "train", "--images", 12, "--size", 64, "--futures", 3
    shape = "--images-per-world", 2, "--images-per-shard", 6
    for job, state in (("1:2", "6 train images, not yet complete"), ("0:2", "12 train images, ")):
        arguments = map(str, (*common, *shape, "--shards", job, "--verify"))
        monkeypatch.setattr("sys.argv", ["sim.dataset", *arguments])
        dataset.main()
        assert state in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "manifest-train.json").read_text())["shards"] == (manifest["shards"])
    )
    monkeypatch.setattr("sys.argv", ["sim.dataset", *map(str, common), "--shards", "2"])
    with pytest.raises(SystemExit):
        dataset.main()
    assert "expected i:n such as 0:4, got '2'" in capsys.readouterr().err


def test_several_workers_and_wide_motions_by_the_command_line(tmp_path, monkeypatch):
    arguments = "--split", "train", "--images", 2, "--size", 32, "--futures", 4, "--wide", 0.4
    shape = "--images-per-world", 1, "--images-per-shard", 1, "--workers", 2
    out = "--out", tmp_path / "workers"
    monkeypatch.setattr("sys.argv", ["sim.dataset", *map(str, (*out, *arguments, *shape))])
    dataset.main()
    manifest = json.loads((tmp_path / "workers" / "manifest-train.json").read_text())
    assert manifest["complete"]
    assert manifest["settings"]["wide_probability"] == 0.4

    one = Settings(32, futures=4, images_per_world=1, images_per_shard=1, wide_probability=0.4)
    assert dataset.write_dataset(tmp_path / "one", "train", 2, one)["shards"] == manifest["shards"]
    narrow = replace(one, wide_probability=0)
    others = dataset.write_dataset(tmp_path / "narrow", "train", 2, narrow)["shards"]
    assert others != manifest["shards"]


def test_damage_is_found(written, tmp_path):
    out, manifest = written
    record = manifest["shards"][0]
    (tmp_path / "manifest-train.json").write_text(json.dumps({"shards": [record]}))
    data = bytearray((out / record["file"]).read_bytes())
    data[1000] ^= 1
    (tmp_path / record["file"]).write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256 .*: remove it, and it is redone"):
        dataset.verify(tmp_path, "train")
    (tmp_path / record["file"]).unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar is missing"):
        dataset.verify(tmp_path, "train")


def test_half_a_shard_is_not_taken_for_a_finished_one(tmp_path):
    settings = replace(SMALL, size=16, images_per_shard=1, images_per_world=1)
    dataset.write_dataset(tmp_path, "train", 1, settings)
    shard = tmp_path / "train-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"has 1000 bytes, its note says \d+: remove it"):
        dataset.write_dataset(tmp_path, "train", 1, settings)
    shard.unlink()
    dataset.write_dataset(tmp_path, "train", 1, settings)
    assert shard.read_bytes() == whole


def test_missing_and_broken_members_are_named():
    members = next(dataset.generate("val", 0, SMALL))
    with pytest.raises(ValueError, match=r"bodies\.png"):
        dataset.read_sample({k: v for k, v in members.items() if k != "bodies.png"})
    with pytest.raises(ValueError, match=r"cannot decode rgb\.jpg"):
        dataset.read_sample({**members, "rgb.jpg": b"no picture"})
    for name in ("rgb.jpg", "body_motion.npy", "meta.json"):
        with pytest.raises(ValueError, match=f"sample val-00000000: cannot decode {name}"):
            dataset.read_sample({**members, name: b""})
    with pytest.raises(ValueError, match=r"meta\.json lacks 'depth_scale'"):
        dataset.read_sample({**members, "meta.json": b"{}"})


def test_splits_hold_their_kinds_and_seeds_only():
    settings = Settings(size=16, futures=1, images_per_world=1, images_per_shard=12)
    found = {
        split: [dataset.read_sample(m) for m in dataset.generate(split, 0, settings)]
        for split in ("train", "val", "held_out")
    }
    assert {s.kind for s in found["train"]} == set(TRAIN_KINDS) == {s.kind for s in found["val"]}
    assert {s.kind for s in found["held_out"]} == set(HELD_OUT_KINDS)
    assert not {s.seed for s in found["train"]} & {s.seed for s in found["val"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images_per_shard", -1),
        ("images_per_world", 0),
        ("futures", 0),
        ("size", 0),
        ("camera_motion_probability", 7.0),
        ("wide_probability", float("nan")),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, received {value}"):
        Settings(**{name: value})


def test_bad_arguments_are_named(tmp_path, monkeypatch):
    options = ["--out", str(tmp_path), "--split", "train", "--images", "0"]
    monkeypatch.setattr("sys.argv", ["sim.dataset", *options])
    with pytest.raises(SystemExit, match="images and workers must be positive, got 0 and 1"):
        dataset.main()
    with pytest.raises(ValueError, match="unknown split 'test'"):
        dataset.write_dataset(tmp_path, "test", 1)
    with pytest.raises(ValueError, match="images and workers"):
        dataset.write_dataset(tmp_path, "train", 0)
    with pytest.raises(ValueError, match="job must be"):
        dataset.write_dataset(tmp_path, "train", 1, job=(2, 2))
