# SPDX-License-Identifier: MIT
"""The ``fpt`` command with real files and a small seeded model; once as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import reference_weights
import torch
from closeness import assert_close
from node_harness import save_small_model
from test_reference import OWN, SMALL, SMALL_SEED

from fpt_model import FlowMixture, FlowPredictor, checkpoint, load_model, save_model
from fpt_ros.cli import main

HEIGHT, WIDTH, FRAMES = 120, 160, 5

# A machine without ROS: importing any of it fails.
WITHOUT_ROS = """
import sys
sys.modules.update(dict.fromkeys(("rclpy", "fpt_msgs", "sensor_msgs", "std_msgs")))
from fpt_ros.cli import main
main()
"""


class Result(NamedTuple):
    """How a run of the command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, which has imported torch already."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Result(ended.value.code, *capsys.readouterr())

    return run


def draw_scene(shift: int) -> np.ndarray:
    """A blue box on a grey ground, BGR."""
    scene = np.full((HEIGHT, WIDTH, 3), 190, np.uint8)
    cv2.rectangle(scene, (40 + shift, 30), (110 + shift, 90), (180, 90, 60), -1)
    return scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_small_model(folder / "small.safetensors")
    cv2.imwrite(str(folder / "box.png"), draw_scene(0))
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    video = cv2.VideoWriter(str(folder / "box.mp4"), fourcc, 10, (WIDTH, HEIGHT))
    for frame in range(FRAMES):
        video.write(draw_scene(4 * frame))
    video.release()
    (folder / "text.png").write_text("not a picture")
    return folder


class Expected(NamedTuple):
    """The library's own answer for box.png, by the definition of the pixel convention."""

    modes: FlowMixture  # [2], px
    moving_share: float


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    predictor = FlowPredictor(load_model(folder / "small.safetensors"))
    scene = predictor.encode(cv2.imread(str(folder / "box.png"))[..., ::-1].copy())
    size = np.array([WIDTH, HEIGHT])
    poke = (np.array([[60, 50]]) + 0.5) / size, np.array([[20, -5]]) / size
    queries = (np.array([[80, 60], [10, 100]]) + 0.5) / size
    modes = predictor.predict(scene, *poke, queries).modes().scaled(WIDTH, HEIGHT)
    return Expected(modes, float(predictor.moving_part(scene, *poke).mean()))


def common(folder: Path) -> list[object]:
    return [
        *("predict", folder / "box.png", "--model", folder / "small.safetensors"),
        *("--poke", "60,50,20,-5", "--query", "80,60", "--query", "10,100"),
    ]


def test_without_ros_json_holds_the_predictors_answer_in_px(folder, expected):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROS, *map(str, common(folder)), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["height"], answer["width"], answer["unit"]) == (HEIGHT, WIDTH, "px")
    assert (answer["model"], answer["horizon_s"]) == ("fpt-test", 0.5)
    assert answer["pokes"] == [{"xy": [60, 50], "flow": [20, -5]}]
    assert [query["xy"] for query in answer["queries"]] == [[80, 60], [10, 100]]
    covariances = expected.modes.component_covariances()
    for q, query in enumerate(answer["queries"]):
        modes = query["modes"]
        approximately = {"rtol": 1e-3, "atol": 1e-3}  # thread counts differ
        for name, values in (
            ("probability", expected.modes.weights[q]),
            ("mean", expected.modes.means[q]),
            ("covariance", covariances[q]),
            ("std", np.sqrt(covariances[q][:, [0, 1], [0, 1]])),
        ):
            np.testing.assert_allclose([mode[name] for mode in modes], values, **approximately)
    assert 0 < expected.moving_share < 1
    assert answer["moving_share"] == pytest.approx(expected.moving_share, abs=1e-3)


def test_table_lists_modes_by_probability_and_overlay_shows_the_poke(run, folder, expected):
    out = folder / "overlay.png"
    result = run(*common(folder), "--out", out)
    assert result.returncode == 0, result.stderr
    assert "160 x 120 px; fpt-test, 0.5 s ahead, camera static" in result.stdout
    assert "poke (60, 50) moves by (20, -5)" in result.stdout
    first_row = next(line for line in result.stdout.splitlines() if line.startswith("80, 60"))
    numbers = [float(text) for text in re.findall(r"[-+]?[\d.]+", first_row)]
    modes = expected.modes
    std = np.sqrt(np.diagonal(modes.component_covariances()[0, 0]))
    row = [80, 60, 1, modes.weights[0, 0], *modes.means[0, 0], *std]
    np.testing.assert_allclose(numbers, row, atol=0.11)
    assert f"moving part: {expected.moving_share:.1%} of the image" in result.stdout

    overlay = cv2.imread(str(out))
    scale = overlay.shape[0] // HEIGHT
    assert overlay.shape == (scale * HEIGHT, scale * WIDTH, 3)
    plain = cv2.resize(draw_scene(0), (scale * WIDTH, scale * HEIGHT))
    poke = slice(scale * 49, scale * 52), slice(scale * 59, scale * 62)
    assert np.abs(overlay[poke].astype(int) - plain[poke]).mean() > 50


def test_default_queries_are_a_grid(run, folder):
    arguments = ("--poke", "60,50,20,-5", "--model", folder / "small.safetensors", "--json")
    result = run("predict", folder / "box.png", *arguments)
    points = [query["xy"] for query in json.loads(result.stdout)["queries"]]
    assert len(points) == 16
    assert points[0] == [19.5, 14.5]
    result = run("predict", folder / "box.png", *arguments, "--grid", "2x1", "--query", "1,2")
    points = [query["xy"] for query in json.loads(result.stdout)["queries"]]
    assert points == [[1, 2], [39.5, 59.5], [119.5, 59.5]]


def test_moving_camera_is_passed_on(run, folder):
    static, moving = (
        json.loads(run(*common(folder), "--json", *extra).stdout)
        for extra in ((), ("--moving-camera",))
    )
    assert static["camera_static"]
    assert not moving["camera_static"]
    assert static["queries"] != moving["queries"]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_video_gives_one_overlay_video(run, folder, suffix):
    out = folder / f"overlay{suffix}"
    arguments = ("--poke", "60,50,20,-5", "--query", "80,60", "--out", out)
    result = run("predict", folder / "box.mp4", *arguments, "--model", folder / "small.safetensors")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("first frame:\n160 x 120 px")
    assert f"{FRAMES}/{FRAMES} frames" in result.stderr
    video = cv2.VideoCapture(str(out))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    first = video.read()[1].astype(int)
    assert first.shape[0] % HEIGHT == 0
    *_, last = (video.read()[1].astype(int) for _ in range(FRAMES - 1))
    scale = first.shape[0] // HEIGHT
    left_edge = slice(scale * 75, scale * 80), slice(scale * 44, scale * 52)
    assert np.abs(first[left_edge] - last[left_edge]).mean() > 30  # the box moves on


def test_video_as_json_is_one_line_a_frame(run, folder):
    arguments = ("--poke", "60,50,20,-5", "--query", "80,60", "--json")
    result = run("predict", folder / "box.mp4", *arguments, "--model", folder / "small.safetensors")
    frames = [json.loads(line) for line in result.stdout.splitlines()]
    assert [frame["frame"] for frame in frames] == list(range(FRAMES))
    assert frames[0]["queries"] != frames[-1]["queries"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["box.png", "--poke", "1,2,3"], ["'1,2,3'", "x,y,dx,dy"]),
        (["box.png", "--poke", "1,2,three,4"], ["'1,2,three,4'", "x,y,dx,dy"]),
        (["box.png", "--poke", "1,2,nan,4"], ["'1,2,nan,4'", "finite"]),
        (["box.png", "--poke", "1,2,3,4", "--query", "5"], ["'5'", "x,y"]),
        (["box.png", "--poke", "1,2,3,4", "--grid", "8"], ["'8'", "COLUMNSxROWS"]),
        (["box.png", "--poke", "1,2,3,4", "--grid", "0x8"], ["'0x8'"]),
        (["box.png", "--poke", "160,50,3,4"], ["poke", "x=160, y=50", "159.5", "119.5"]),
        (["box.png", "--poke", "-1,50,3,4"], ["poke", "x=-1, y=50", "-0.5"]),
        (["box.png", "--poke", "1,2,3,4", "--query", "5,400"], ["query", "x=5, y=400"]),
        (["missing.png", "--poke", "1,2,3,4"], ["missing.png", "no such file"]),
        (["text.png", "--poke", "1,2,3,4"], ["text.png", "picture or video"]),
        (["box.png", "--poke", "1,2,3,4", "--model", "no-model"], ["no-model", "neither a file"]),
        (["box.png", "--poke", "1,2,3,4", "--model", "{}/text.png"], ["text.png", "checkpoint"]),
        (["box.png", "--poke", "1,2,3,4", "--out", "{}/none/o.png"], ["none/o.png", "folder"]),
        (["box.png", "--poke", "1,2,3,4", "--out", "{}/o.text"], ["o.text", ".png"]),
        (["box.mp4", "--poke", "1,2,3,4", "--out", "{}/o.png"], ["o.png", ".mp4"]),
        (["box.mp4", "--poke", "1,2,3,4"], ["box.mp4", "is a video", "--out"]),
        (["box.mp4", "--poke", "1,2,3,4", "--out", "{}/box.mp4"], ["would overwrite", "box.mp4"]),
        (["box.png", "--poke", "1,2,3,4", "--ply", "{}/box.png"], ["--ply would overwrite", "box"]),
        (
            ["box.png", "--poke", "1,2,3,4", "--depth", "{}/box.mp4", "--out", "{}/box.mp4"],
            ["--out would overwrite", "box.mp4"],
        ),
        (
            ["box.png", "--poke", "1,2,3,4", "--out", "{}/o.png", "--ply", "{}/o.png"],
            ["--ply would overwrite", "o.png"],
        ),
        (["box.png", "--poke", "1,2,3,4,nan"], ["x,y,dx,dy,dz", "dz in m or left out"]),
        (["box.png", "--poke", "1,2,3,4,0.5"], ["dz=0.5", "fpt-tiny is planar"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(run, folder, arguments, named):
    image, *options = (argument.format(folder) for argument in arguments)
    result = run("predict", folder / image, *options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    for part in ("fpt: error: ", *named):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "Missing option '--poke'"),
        (("--pok", "1,2,3,4"), "No such option: --pok"),
        (("--poke", "1,2,3,4", "second.png"), "(second.png)"),
    ],
)
def test_wrong_usage_is_named_and_exit_2(run, arguments, named):
    result = run("predict", "x.png", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: fpt predict ")
    assert named in result.stderr


def test_help_describes_every_option(run):
    assert "predict" in run("--help").stdout
    text = run("predict", "--help").stdout
    for option in ("--poke", "--query", "--grid", "--out", "--model", "--moving-camera", "--json"):
        assert re.search(rf"{option}.*  \w", text), option


def test_the_licence_of_other_peoples_weights_is_told(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    model = load_model(folder / "small.safetensors")
    model.config = replace(model.config, licence="CC-BY-NC-4.0")
    save_model(model, tmp_path / "theirs.safetensors")
    for file, told in (
        (tmp_path / "theirs.safetensors", True),
        (folder / "small.safetensors", False),
    ):
        result = run(
            "predict",
            folder / "box.png",
            "--poke",
            "70,60,9,0",
            "--grid",
            "1x1",
            "--json",
            "--model",
            file,
        )
        assert result.returncode == 0, result.stderr
        assert ("licence CC-BY-NC-4.0" in result.stderr) == told
        json.loads(result.stdout)


class TestConvert:
    @pytest.mark.parametrize("mapped", [True, False])
    def test_published_layout_to_safetensors(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
    ) -> None:
        """A small seeded state dict of the public implementation, as its checkpoint files hold it.

        Its outputs are those of the parity fixture, see test_reference.py.
        """
        shapes = json.loads((OWN / "parity_shapes.json").read_text())
        state = reference_weights.state_dict(SMALL_SEED, shapes)
        source, out = tmp_path / "small.pt", tmp_path / "small.safetensors"
        # torch's older files cannot be mapped into memory
        torch.save({"model": state, "step": 3}, source, _use_new_zipfile_serialization=mapped)
        assert checkpoint._is_archive(source) == mapped
        # the published file is fpt-base: a smaller one is refused at its first tensor
        result = run("convert", source, out)
        assert result.returncode == 2
        assert "image_embedder.model.cls_token" in result.stderr
        assert "expected" in result.stderr
        assert not out.exists()

        monkeypatch.setattr(checkpoint, "FPT_BASE", SMALL)
        monkeypatch.setattr(checkpoint._MappedFile, "_LIMIT", 0)  # opened for every tensor
        result = run("convert", source, out)
        assert result.returncode == 0, result.stderr
        t = reference_weights.inputs(SMALL_SEED, 112, batch=2, pokes=5, queries=12)
        points = t["poke_pos"], t["poke_flow"], t["query_pos"]
        for file in (source, out):
            model = load_model(file)
            assert model.config == SMALL
            with torch.no_grad():
                raw = model.forward_raw(
                    model.encode(t["image"]), *points, torch.tensor([True, False])
                )
            assert_close(raw, np.load(OWN / "parity_outputs.npz")["raw"], 1e-5)

    def test_other_types_and_mistakes(self, run: Run, folder: Path, tmp_path: Path) -> None:
        model_file, out = folder / "small.safetensors", tmp_path / "half.safetensors"
        result = run("convert", model_file, out, "--dtype", "float16")
        assert result.returncode == 0, result.stderr
        assert "as float16" in result.stdout
        assert "licence of the weights MIT" in result.stdout
        whole, half = load_model(model_file).state_dict(), load_model(out).state_dict()
        for key, value in whole.items():
            assert torch.equal(half[key], value.half().float()), key
        for arguments, message in (
            ((model_file, out), "exists already"),
            ((model_file, tmp_path / "no" / "x.safetensors"), "does not exist"),
            ((model_file, tmp_path / "x.pt"), "must end with .safetensors, received"),
            ((model_file, tmp_path / "y.safetensors", "--dtype", "int8"), "received 'int8'"),
            ((tmp_path / "none.pt", tmp_path / "y.safetensors"), "none.pt"),
        ):
            result = run("convert", *arguments)
            assert result.returncode == 2
            assert message in result.stderr
