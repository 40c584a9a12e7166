# SPDX-License-Identifier: MIT
"""Training data, trainer and evaluation, on a few images that the simulation really made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fpt_model import FlowPredictor, load_model
from fpt_model.geometry import grid
from sim.dataset import Settings, write_dataset
from training import evaluate, train
from training.config import DataConfig, RunConfig
from training.data import Crop, ExampleDataset, Shards, make_example, random_crop

CONFIG = RunConfig.from_dict(
    {
        "model": {
            "name": "small",
            "encoder": "vit_tiny_patch16_224",
            "encoder_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
            "image_size": 32,
            "width": 48,
            "depth": 2,
            "head_dim": 16,
            "fit": "stretch",
        },
        "data": {"visible_pokes": [0, 1, 3], "queries_per_group": 4},
        "optim": {
            "batch_size": 4,
            "steps": 4,
            "warmup_steps": 2,
            "precision": "fp32",
            "checkpoint_every": 2,
            "validate_every": 2,
        },
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    settings = Settings(size=64, images_per_shard=12)
    for split in ("train", "val", "held_out"):
        write_dataset(out, split, 12, settings)
    return out


def test_examples_are_a_function_of_their_number(data: Path) -> None:
    a, b = (ExampleDataset(Shards(data, "train"), CONFIG) for _ in range(2))
    for number in (13, 2, 40):
        for x, y in zip(a[number], b[number], strict=True):
            assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
    assert not torch.equal(a[2].image, a[14].image), "the order changes from epoch to epoch"


def test_an_epoch_shows_every_image_once(data: Path) -> None:
    dataset = ExampleDataset(Shards(data, "train"), CONFIG)
    _ = dataset[12]
    assert sorted(dataset._order) == list(range(12))


def test_examples_carry_the_true_motion(data: Path) -> None:
    """Whatever the crop, an example's pokes and queries move as the stored sample says."""
    shards = Shards(data, "train")
    exact = DataConfig(target_noise=0, poke_noise=0, queries_per_group=4)
    checked = 0
    for index in range(len(shards)):
        sample = shards[index]
        seed = [0, index]
        example = make_example(sample, 32, exact, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)  # the same draws again
        future = int(rng.integers(sample.futures))
        crop = random_crop(sample.rgb.shape[:2], exact, rng)
        for pos, flow in (
            (example.poke_pos, example.poke_flow),
            (example.query_pos.flatten(0, 1), example.query_flow.flatten(0, 1)),
        ):
            x = pos.double().numpy()
            if crop.flip:
                x[:, 0] = 1 - x[:, 0]
            xy = x * [crop.width, crop.height] + [crop.left, crop.top] - 0.5
            assert np.abs(xy - xy.round()).max() < 1e-3, "positions are pixel centres"
            true = sample.flow_at(future, xy.round().astype(int)).flow
            true = true * [64 / crop.width, 64 / crop.height]
            if crop.flip:
                true[:, 0] *= -1
            known = ~flow.isnan().any(-1).numpy()
            assert np.abs(flow.numpy()[known] - np.clip(true, -1, 1)[known]).max() < 1e-5
            checked += int((np.abs(true) > 1e-3).any(-1).sum())
    assert checked > 50, "the samples show motion"


def test_crops_move_pictures_and_points_alike() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[40:44, 20:24] = 255
    for flip in (False, True):
        crop = Crop(left=8, top=16, width=48, height=32, flip=flip)
        shown = crop.image(picture, 96)[..., 0].astype(float)
        rows, cols = np.nonzero(shown > 127)
        centre = np.array([(cols.mean() + 0.5) / 96, (rows.mean() + 0.5) / 96])
        corners = crop.positions(np.array([[20, 40], [23, 43]]))
        assert np.abs(corners.mean(0) - centre).max() < 0.01


def parameters(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "last.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train.Trainer(CONFIG, data, out).run()
    return out


def test_resuming_is_exact(data: Path, run: Path, tmp_path: Path) -> None:
    """Two steps, a stop, and two more give the same weights as four."""
    first = train.Trainer(CONFIG, data, tmp_path)
    interrupted = iter(
        train.training_batches(ExampleDataset(Shards(data, "train"), CONFIG), 4, 0, 4)
    )
    train.set_training_mode(first.model)
    for _ in range(2):
        first._train_step(next(interrupted))
        first.step += 1
    first.save()
    train.Trainer(CONFIG, data, tmp_path).run()
    resumed, whole = parameters(tmp_path), parameters(run)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_the_run_leaves_a_usable_model(run: Path, data: Path) -> None:
    model = load_model(run / "model.safetensors")
    assert model.config == CONFIG.model
    lines = [json.loads(x) for x in (run / "validation.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4]
    assert all(np.isfinite(list(x.values())).all() for x in lines)
    assert RunConfig.load(run / "config.yaml") == CONFIG


def test_training_learns(data: Path, tmp_path: Path) -> None:
    config = RunConfig.from_dict(
        {
            **CONFIG.to_dict(),
            "optim": {**CONFIG.to_dict()["optim"], "steps": 60, "validate_every": 60},
        }
    )
    trainer = train.Trainer(config, data, tmp_path)
    batch = trainer.validation[0]
    before = trainer._loss(batch).item()
    trainer.run()
    after = trainer._loss(batch).item()
    assert after < before - 0.5, f"NLL {before:.2f} -> {after:.2f}"


def test_truth_on_the_grid_and_scores(data: Path, run: Path) -> None:
    shards = Shards(data, "val")
    for sample, truth in evaluate.scenes(shards, 4):
        largest = np.linalg.norm(truth.flow, axis=-1)[truth.moving].max()
        assert np.linalg.norm(truth.poke_flow) == pytest.approx(largest)
        perfect = np.where(truth.moving[..., None], truth.flow, 0)
        assert evaluate.endpoint_error(perfect, truth) < 1e-6, "nothing else moves"
        assert sample.rgb.shape == (64, 64, 3)
    predictor = FlowPredictor(load_model(run / "model.safetensors"))
    figures = evaluate.evaluate(predictor, data, 4)
    held_out = figures["held_out"]
    assert held_out["scenes"] == sum(k["scenes"] for k in held_out["kinds"].values()) > 0
    assert set(held_out["kinds"]) <= {"lid", "lever", "turntable"}
    assert held_out["epe_copy_best_radius"] <= held_out["epe_no_motion"] + 1e-9
    assert 0 <= held_out["iou_kl"] <= 1


def test_a_perfect_prediction_scores_perfectly(data: Path) -> None:
    truths = [t for _, t in evaluate.scenes(Shards(data, "val"), 4)]
    records = evaluate.Records(
        kind=["x"] * len(truths),
        truth=truths,
        flow=[t.flow for t in truths],
        kl=[t.moving.astype(float) for t in truths],
        nll=[0.0] * len(truths),
    )
    figures = evaluate.report(records, {"kl": 0.5, "flow": 1e-6})
    assert figures["epe"] == 0
    assert figures["iou_kl"] == 1
    assert figures["iou_disc_best_radius"] < 1
    assert evaluate.intersection_over_union(
        np.array([1, 1, 0], bool), np.array([0, 1, 1], bool)
    ) == (pytest.approx(1 / 3))
    assert len(grid(evaluate.SIZE)) == 4096


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "modle"),
        ({"data": {"poke": 3}}, "poke"),
        ({"optim": {"precision": "fp8"}}, "fp8"),
    ],
)
def test_configuration_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-\*\.tar"):
        Shards(tmp_path, "train")
