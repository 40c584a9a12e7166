# SPDX-License-Identifier: MIT
"""What README's "Train your own" does, on a few hundred pictures: commands as processes."""

import json
import subprocess
import sys
from pathlib import Path

from fpt_model import load_model

ROOT = Path(__file__).parents[1]


def test_from_worlds_to_figures(tmp_path: Path) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "figures"
    fpt = [sys.executable, "-m", "fpt_ros.cli"]
    make = [sys.executable, "-m", "sim.dataset", "--out", data, "--size", 64, "--futures", 3]
    make += ["--images-per-world", 1, "--images-per-shard", 120, "--workers", 2]
    train = [*fpt, "train", "--config", "training/configs/tiny.yaml", "--data", data, "--out", run]
    for command in (
        [*make, "--split", "train", "--images", 240, "--wide", 0.4],
        [*make, "--split", "val", "--images", 120],
        [*make, "--split", "held_out", "--images", 120],
        [*train, "--quick", "optim.start_from=fpt-tiny", "optim.pretrained_encoder=false"],
        [
            *(*fpt, "eval", "--suite", "procedural", "--quick", "--data", data, "--out", out),
            *("--model", run / "model.safetensors"),
        ],
    ):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    manifest = json.loads((data / "manifest-train.json").read_text())
    assert manifest["complete"]
    assert manifest["images"] == 240
    assert load_model(run / "model.safetensors").config.image_size == 160
    found = json.loads((out / "figures.json").read_text())["splits"]
    assert found.keys() == {"val", "held_out"}
    # Four steps spoil nothing of what the shipped model knows.
    assert all(0 < split["largest"]["epe"]["median_over_no_motion"] < 1 for split in found.values())
