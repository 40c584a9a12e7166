# SPDX-License-Identifier: MIT
"""The ``fpt`` command as a user runs it: a process, real files, a small seeded model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fpt_model import FlowPokeTransformer, FlowPredictor, FPTConfig, load_model, save_model

HEIGHT, WIDTH, FRAMES = 120, 160, 5

# A machine without ROS: importing any of it fails.
WITHOUT_ROS = """
import sys
sys.modules.update(dict.fromkeys(("rclpy", "fpt_msgs", "sensor_msgs", "std_msgs")))
from fpt_ros.cli import main
main()
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_ROS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


def draw_scene(shift: int) -> np.ndarray:
    """A blue box on a grey ground, BGR."""
    scene = np.full((HEIGHT, WIDTH, 3), 190, np.uint8)
    cv2.rectangle(scene, (40 + shift, 30), (110 + shift, 90), (180, 90, 60), -1)
    return scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    small_encoder = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    config = FPTConfig(
        name="fpt-test",
        encoder_kwargs=small_encoder,
        image_size=64,
        width=64,
        head_dim=32,
        depth=1,
        horizon_s=0.5,
        kl_threshold=1e-9,
    )
    model = FlowPokeTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():  # layers start as zeros; the image must matter
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(model, folder / "small.safetensors")
    cv2.imwrite(str(folder / "box.png"), draw_scene(0))
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    video = cv2.VideoWriter(str(folder / "box.mp4"), fourcc, 10, (WIDTH, HEIGHT))
    for frame in range(FRAMES):
        video.write(draw_scene(4 * frame))
    video.release()
    (folder / "text.png").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path):
    """The library's own answer for box.png, in px, by the definition of the pixel convention."""
    predictor = FlowPredictor(load_model(folder / "small.safetensors"))
    scene = predictor.encode(cv2.imread(str(folder / "box.png"))[..., ::-1].copy())
    size = np.array([WIDTH, HEIGHT])
    position, flow = (np.array([[60, 50]]) + 0.5) / size, np.array([[20, -5]]) / size
    queries = (np.array([[80, 60], [10, 100]]) + 0.5) / size
    return predictor.predict(scene, position, flow, queries).modes().scaled(WIDTH, HEIGHT)


def common(folder: Path) -> list[object]:
    return [
        *("predict", folder / "box.png", "--model", folder / "small.safetensors"),
        *("--poke", "60,50,20,-5", "--query", "80,60", "--query", "10,100"),
    ]


def test_json_holds_the_predictors_answer_in_px(folder, expected):
    result = run(*common(folder), "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["height"], answer["width"], answer["unit"]) == (HEIGHT, WIDTH, "px")
    assert (answer["model"], answer["horizon_s"]) == ("fpt-test", 0.5)
    assert answer["pokes"] == [{"xy": [60, 50], "flow": [20, -5]}]
    assert [query["xy"] for query in answer["queries"]] == [[80, 60], [10, 100]]
    covariances = expected.component_covariances()
    for q, query in enumerate(answer["queries"]):
        modes = query["modes"]
        approximately = {"rtol": 1e-3, "atol": 1e-3}  # thread counts differ
        for name, values in (
            ("probability", expected.weights[q]),
            ("mean", expected.means[q]),
            ("covariance", covariances[q]),
            ("std", np.sqrt(covariances[q][:, [0, 1], [0, 1]])),
        ):
            np.testing.assert_allclose([mode[name] for mode in modes], values, **approximately)
    assert 0 <= answer["moving_share"] <= 1


def test_table_lists_modes_by_probability_and_overlay_shows_the_poke(folder, expected):
    out = folder / "overlay.png"
    result = run(*common(folder), "--out", out)
    assert result.returncode == 0, result.stderr
    assert "160 x 120 px; fpt-test, 0.5 s ahead, camera static" in result.stdout
    assert "poke (60, 50) moves by (20, -5)" in result.stdout
    first_row = next(line for line in result.stdout.splitlines() if line.startswith("80, 60"))
    numbers = [float(text) for text in re.findall(r"[-+]?[\d.]+", first_row)]
    std = np.sqrt(np.diagonal(expected.component_covariances()[0, 0]))
    row = [80, 60, 1, expected.weights[0, 0], *expected.means[0, 0], *std]
    np.testing.assert_allclose(numbers, row, atol=0.11)
    assert re.search(r"moving part: [\d.]+% of the image", result.stdout)

    overlay = cv2.imread(str(out))
    scale = overlay.shape[0] // HEIGHT
    assert overlay.shape == (scale * HEIGHT, scale * WIDTH, 3)
    plain = cv2.resize(draw_scene(0), (scale * WIDTH, scale * HEIGHT))
    poke = slice(scale * 49, scale * 52), slice(scale * 59, scale * 62)
    assert np.abs(overlay[poke].astype(int) - plain[poke]).mean() > 50


def test_default_queries_are_a_grid(folder):
    arguments = ("--poke", "60,50,20,-5", "--model", folder / "small.safetensors", "--json")
    result = run("predict", folder / "box.png", *arguments)
    points = [query["xy"] for query in json.loads(result.stdout)["queries"]]
    assert len(points) == 16
    assert points[0] == [19.5, 14.5]
    result = run("predict", folder / "box.png", *arguments, "--grid", "2x1", "--query", "1,2")
    points = [query["xy"] for query in json.loads(result.stdout)["queries"]]
    assert points == [[1, 2], [39.5, 59.5], [119.5, 59.5]]


def test_moving_camera_is_passed_on(folder):
    static, moving = (
        json.loads(run(*common(folder), "--json", *extra).stdout)
        for extra in ((), ("--moving-camera",))
    )
    assert static["camera_static"]
    assert not moving["camera_static"]
    assert static["queries"] != moving["queries"]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_video_gives_one_overlay_video(folder, suffix):
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


def test_video_as_json_is_one_line_a_frame(folder):
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
        (["box.mp4", "--poke", "1,2,3,4"], ["is a video", "--out"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(folder, arguments, named):
    image, *options = (argument.format(folder) for argument in arguments)
    result = run("predict", folder / image, *options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    for part in ("fpt: error: ", *named):
        assert part in result.stderr


def test_missing_poke_and_unknown_option_exit_2(folder):
    for arguments, named in ((("x.png",), "--poke"), (("x.png", "--pok", "1"), "--pok")):
        result = run("predict", *arguments)
        assert result.returncode == 2
        assert named in result.stderr
        assert "Traceback" not in result.stderr


def test_help_describes_every_option():
    assert "predict" in run("--help").stdout
    text = run("predict", "--help").stdout
    for option in ("--poke", "--query", "--grid", "--out", "--model", "--moving-camera", "--json"):
        assert option in text
