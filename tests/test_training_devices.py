# SPDX-License-Identifier: MIT
"""Training by several processes, and the shipped recipes, dry-run on tiny sizes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpt_model import FlowPokeTransformer, load_model
from fpt_model.config import FPT_BASE
from fpt_ros.cli import main
from training.config import RunConfig
from training.data import Share
from training.devices import launch, started_processes
from training.pretrained import load_encoder
from training.tracks import write_clips
from training.train import Trainer

CONFIGS = Path("training/configs")
TINY = (
    "model.encoder_kwargs={embed_dim: 32, depth: 1, num_heads: 2}",
    *("model.image_size=56", "model.width=48", "model.depth=2", "model.head_dim=16"),
    *("data.visible_pokes=6", "data.queries_per_group=4", "optim.precision=fp32"),
    *("optim.compile=false", "optim.batch_size=4", "optim.warmup_steps=2", "optim.decay_steps=0"),
)
FROM_SCRATCH = ("optim.pretrained_encoder=false", *TINY)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen clips of 27 frames, of points that move to the right on the right half."""
    out = tmp_path_factory.mktemp("clips")
    size, frames, count = 64, 74, 60
    rng = np.random.default_rng(0)
    video = out / "video.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 25, (size, size))
    ground = rng.integers(0, 256, (size, size, 3), np.uint8)
    for t in range(frames):
        ground[:, size // 2 :] = np.roll(ground[:, size // 2 :], t % 2, axis=1)
        writer.write(ground)
    writer.release()
    start = rng.uniform(2, size - 3, (count, 2))
    speed = np.where(start[:, :1] > size / 2, 0.2, 0.0) * [1, 0]
    tracks = start + np.arange(frames)[:, None, None] * speed
    given = out / "tracks.npy", out / "visibility.npy"
    for file, array in zip(given, (tracks, np.ones((frames, count), bool)), strict=True):
        np.save(file, array)
    for split in ("train", "val"):
        made = write_clips(video, out / f"{split}-000000.tar", 26 / 25, 2 / 25, given=given)
        assert made == 24
    return out


def config(name: str, *overrides: str) -> RunConfig:
    return RunConfig.load(CONFIGS / f"{name}.yaml", list(overrides))


def validations(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps by one process."""
    out = tmp_path_factory.mktemp("alone")
    steps = "optim.steps=6", "optim.validate_every=2"
    Trainer(config("base", *FROM_SCRATCH, *steps), clips, out).run()
    return out


def test_several_processes_learn_what_one_does(clips: Path, alone: Path, tmp_path: Path) -> None:
    """By torchrun and gloo; and what two processes began, one can finish."""
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    command = "-m", "fpt_ros.cli", "train", "--config", CONFIGS / "base.yaml", "--data", clips
    options = "--out", tmp_path, "--accelerator", "cpu", "--workers", "0", *FROM_SCRATCH
    steps = "optim.steps=4", "optim.validate_every=2"
    done = subprocess.run(
        list(map(str, (sys.executable, *torchrun, *command, *options, *steps))),
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "steps 0 to 4, 2 x cpu" in done.stderr
    assert done.stdout.count("model.safetensors: fpt-base after 4 steps") == 1

    whole = validations(alone)
    assert [v["step"] for v in validations(tmp_path)] == [2, 4]
    for two, one in zip(validations(tmp_path), whole, strict=False):
        assert two["train_nll"] == pytest.approx(one["train_nll"], abs=1e-5)

    trainer = Trainer(config("base", *FROM_SCRATCH, *steps, "optim.steps=6"), clips, tmp_path)
    assert trainer.step == 4
    before = trainer.cpu_seconds
    assert before > 0
    trainer.run()
    assert trainer.cpu_seconds > before
    assert [v["step"] for v in validations(tmp_path)] == [v["step"] for v in whole] == [2, 4, 6]
    assert whole[-1]["robust_nll/5_pokes"] < whole[0]["robust_nll/5_pokes"]
    for two, one in zip(validations(tmp_path), whole, strict=True):
        assert two.keys() == one.keys()
        for name in one.keys() - {"time", "train_nll"}:
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_validation_is_drawn(alone: Path) -> None:
    events = EventAccumulator(str(alone / "tensorboard"))
    events.Reload()
    pictures = events.Images("val_scenes")
    assert [p.step for p in pictures] == [2, 4, 6]
    picture = cv2.imdecode(np.frombuffer(pictures[-1].encoded_image_string, np.uint8), 1)
    assert picture.shape[1] > picture.shape[0] > 200
    assert picture.std() > 20
    figures = validations(alone)[-1]
    assert events.Scalars("val_epe/5_pokes")[-1].value == pytest.approx(figures["epe/5_pokes"])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_examples(world: int) -> None:
    """Step by step, what they have one after the other is what one process would have."""
    shares = [list(Share(8, 3, 6, rank, world)) for rank in range(world)]
    local = 8 // world
    for i, step in enumerate((3, 4, 5)):
        together = [n for share in shares for n in share[i * local : (i + 1) * local]]
        assert together == list(range(8 * step, 8 * step + 8))
    assert len(Share(8, 3, 6, 0, world)) == 3 * local


def test_batches_must_split_evenly() -> None:
    with pytest.raises(ValueError, match="received 6 for 4 processes"):
        Share(6, 0, 1, 0, 4)


def test_what_torchrun_and_srun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started_processes() is None
    slurm = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "fpt"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert started_processes() == (8, 2)
    torchrun = {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12", "LOCAL_RANK": "0", "RANK": "0"}
    for name, value in {"TORCHELASTIC_RUN_ID": "1", **torchrun}.items():
        monkeypatch.setenv(name, value)
    assert started_processes() == (4, 3), "it runs within srun"
    with pytest.raises(ValueError, match=r"`devices=5`.* does not match"):
        launch("fp32", "cpu", devices=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "fsdp"), "strategy must be one of ('auto', 'ddp'), received 'fsdp'"),
        (("--accelerator", "abacus"), "abacus"),
        (("--config", "training/configs/none.yaml"), "none.yaml"),
    ],
)
def test_mistakes_are_named(
    options: tuple[str, ...],
    message: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = "--config", CONFIGS / "base.yaml", "--data", clips, "--out", tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, common), *options, *FROM_SCRATCH])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ recipes


def test_the_papers_model_is_the_published_ones() -> None:
    base = config("base")
    assert base.model == replace(FPT_BASE, licence="MIT")
    assert base.data.visible_pokes == tuple(range(128))
    assert base.data.without_augmentation() == base.data
    tuned = config("drag-a-move")
    assert tuned.model == FPT_BASE, "the licence of the weights that it starts from"
    assert tuned.optim.start_from
    assert not tuned.optim.pretrained_encoder


def test_the_single_gaussian_differs_in_that_and_its_likelihood_alone() -> None:
    tiny, single = config("tiny"), config("single-gaussian")
    assert single.model == replace(tiny.model, name=single.model.name, components=1)
    # and in its likelihood: the plain one, by which evaluation compares them
    assert (single.data, single.optim) == (tiny.data, replace(tiny.optim, outlier_share=0))


def test_fine_tuning_goes_on_from_a_model(clips: Path, alone: Path, tmp_path: Path) -> None:
    start = alone / "model.safetensors"
    overrides = (*TINY, f"optim.start_from={start}", "data.visible_pokes=[0, 1, 2]")
    arguments = "--config", CONFIGS / "drag-a-move.yaml", "--data", clips, "--out", tmp_path
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments), "--quick", *overrides, "optim.learning_rate=0"])
    assert ended.value.code == 0
    before, after = load_model(start), load_model(tmp_path / "model.safetensors")
    assert after.config.licence == "CC-BY-NC-4.0"
    for key, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[key])
        assert same or key.startswith("encoder.backbone."), f"{key}: with a rate of zero"
    assert RunConfig.load(tmp_path / "config.yaml").data.horizon_frames == 1


def test_the_encoder_starts_from_a_file_of_dinov2s(tmp_path: Path) -> None:
    """With registers, positions for another image size, and the tensors that nobody uses."""
    torch.manual_seed(0)
    model = FlowPokeTransformer(config("base", *FROM_SCRATCH).model)
    own = model.encoder.backbone.state_dict()
    theirs = {k: torch.randn_like(v) for k, v in own.items() if k not in ("reg_token", "pos_embed")}
    theirs["register_tokens"] = torch.randn_like(own["reg_token"])
    theirs["pos_embed"] = torch.full((1, 1 + 37 * 37, 32), 2.0)
    theirs["mask_token"] = torch.zeros(1, 32)
    torch.save(theirs, tmp_path / "dino.pth")
    load_encoder(model, str(tmp_path / "dino.pth"))
    loaded = model.encoder.backbone.state_dict()
    assert torch.equal(loaded["cls_token"], theirs["cls_token"] + 2)
    assert torch.equal(loaded["reg_token"], theirs["register_tokens"])
    assert torch.allclose(loaded["pos_embed"], torch.tensor(2.0))
    for key in theirs.keys() & loaded.keys() - {"cls_token", "pos_embed"}:
        assert torch.equal(loaded[key], theirs[key]), key
    torch.save({"a": torch.zeros(1), "mask_token": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth has not the weights of .* 'cls_token'"):
        load_encoder(model, str(tmp_path / "other.pth"))


def test_files_extend_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {width: 96, head_dim: 32}\noptim: {steps: 7}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nmodel: {width: 64}\ndata: {flip: 0}\n")
    found = RunConfig.load(tmp_path / "b.yaml", ["optim.seed=1"])
    assert (found.model.width, found.model.head_dim, found.data.flip) == (64, 32, 0)
    assert (found.optim.steps, found.optim.seed) == (7, 1)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(ValueError, match=r"b\.yaml extends itself"):
        RunConfig.load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("optim: 3\n")
    with pytest.raises(ValueError, match="section optim must hold keys, received 3"):
        RunConfig.load(tmp_path / "c.yaml")
