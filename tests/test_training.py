# SPDX-License-Identifier: MIT
"""Training data and trainer, on a few images that the simulation really made."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from random_weights import randomised
from safetensors.torch import load_file

from fpt_model import FlowMixture, FlowPokeTransformer, load_model, save_model
from fpt_model.encoder import preprocess
from fpt_model.geometry import normalised_to_pixels
from fpt_model.model import mixture_parameters
from fpt_ros.cli import main
from sim.dataset import GENERATOR, Settings, write_dataset
from training import train
from training.config import DataConfig, RunConfig
from training.data import (
    Crop,
    Example,
    ExampleDataset,
    Shards,
    Share,
    choose_futures,
    load_batches,
    make_example,
    random_crop,
)
from training.losses import Learner, energy_score, robust
from training.validation import Validation

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
        "data": {
            "visible_pokes": [0, 1, 3],
            "queries_per_group": 4,
            "futures_per_image": 2,
            "segment_points": 5,
        },
        "optim": {
            "batch_size": 4,
            "steps": 4,
            "warmup_steps": 2,
            "segment_weight": 1.0,
            "optimiser": "muon",
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
    for split in ("train", "val"):
        write_dataset(out, split, 12, settings)
    return out


def test_examples_are_a_function_of_their_number(data: Path) -> None:
    a, b = (ExampleDataset(Shards(data, "train"), CONFIG) for _ in range(2))
    for number in (13, 2, 40):
        for x, y in zip(a[number], b[number], strict=True):
            assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
    assert not torch.equal(a[2].image, a[14].image), "the order changes from epoch to epoch"


def test_an_epoch_shows_every_image_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    example = Shards.example

    def noted(self: Shards, index: int, *arguments: Any) -> Any:
        shown.append(index)
        return example(self, index, *arguments)

    monkeypatch.setattr(Shards, "example", noted)
    dataset = ExampleDataset(Shards(data, "train"), CONFIG)
    for number in range(24):
        _ = dataset[number]
    assert sorted(shown[:12]) == sorted(shown[12:]) == list(range(12))
    assert shown[:12] != shown[12:]


@pytest.mark.parametrize("futures", [1, 3, 11])
def test_examples_carry_the_true_motion(data: Path, futures: int) -> None:
    """Whatever the crop, an example's points move, and belong, as the stored sample says."""
    shards = Shards(data, "train")
    exact = DataConfig(
        target_noise=0,
        poke_noise=0,
        queries_per_group=4,
        futures_per_image=futures,
        segment_points=10,
        quarter_turn=0.5,
        hide_static_flag=0,
    )
    checked, turns, flags = 0, set(), set()
    for index in range(len(shards)):
        sample = shards[index]
        seed = [0, index]
        example = make_example(sample, 32, exact, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)  # the same draws again
        crop = random_crop(sample.rgb.shape[:2], exact, rng)
        turns.add(crop.turns)
        shown = rng.choice(sample.futures, futures, replace=futures > sample.futures)
        assert futures > sample.futures or len(set(shown)) == futures

        def stored_pixels(pos: torch.Tensor, crop: Crop = crop) -> np.ndarray:
            x, y = pos.double().numpy().T
            for _ in range(crop.turns):
                x, y = 1 - y, x  # a quarter turn back
            if crop.flip:
                x = 1 - x
            xy = np.stack([x * crop.width + crop.left, y * crop.height + crop.top], -1) - 0.5
            assert np.abs(xy - xy.round()).max() < 1e-3, "positions are pixel centres"
            return xy.round().astype(int)

        for f, future in enumerate(shown):
            for pos, flow in (
                (example.poke_pos[f], example.poke_flow[f]),
                (example.query_pos[f].flatten(0, 1), example.query_flow[f].flatten(0, 1)),
            ):
                true = sample.flow_at(int(future), stored_pixels(pos)).flow
                dx, dy = (true * [64 / crop.width, 64 / crop.height]).T
                if crop.flip:
                    dx = -dx
                for _ in range(crop.turns):
                    dx, dy = dy, -dx
                known = ~flow.isnan().any(-1).numpy()
                expected = np.clip(np.stack([dx, dy], -1), -1, 1)
                assert np.abs(flow.numpy()[known] - expected[known]).max() < 1e-5
                checked += int((np.abs(true) > 1e-3).any(-1).sum())
        assert example.camera_static.tolist() == sample.camera_static[shown].tolist()
        flags |= set(example.camera_static.tolist())
        u, v = stored_pixels(example.segment_pos).T
        assert np.array_equal(example.segment_body.numpy(), sample.bodies[v, u])
    assert checked > 50, "the samples show motion"
    assert len(turns) > 1
    assert flags == {False, True}, "moving and standing cameras"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_crops_move_pictures_and_points_alike(flip: bool, turns: int) -> None:
    """A pixel's colour, and what lies at the end of its motion, are found at its new place."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 40, 3), np.uint8)
    crop = Crop(left=3, top=5, width=32, height=32, flip=flip, turns=turns)
    shown = crop.image(picture, 32)  # of its own size: exact

    def colours(positions: np.ndarray) -> np.ndarray:
        u, v = normalised_to_pixels(positions, (32, 32)).round().astype(int).T
        return shown[v, u]

    start, end = rng.integers([3, 5], [35, 37], (2, 50, 2))
    assert np.array_equal(colours(crop.positions(start)), picture[start[:, 1], start[:, 0]])
    moved = crop.positions(start) + crop.displacements((end - start) / 40, (40, 40))
    assert np.array_equal(colours(moved), picture[end[:, 1], end[:, 0]])


def test_turned_crops_are_those_of_the_turned_picture() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (48, 48, 3), np.uint8)
    for turns in range(4):
        crop = Crop(left=0, top=0, width=48, height=48, flip=True, turns=turns)
        changed = np.ascontiguousarray(np.rot90(picture[:, ::-1], turns))
        assert np.array_equal(crop.image(picture, 48), changed)
        small = Crop(0, 0, 48, 48).image(changed, 32).astype(int)
        assert np.abs(crop.image(picture, 32) - small).max() <= 1, "rounding"


def test_crops_are_resized_as_images_are_for_inference() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    seen = preprocess(picture, CONFIG.model)[0].permute(1, 2, 0).numpy()
    crop = Crop(0, 0, 80, 60).image(picture, CONFIG.model.image_size)
    assert np.abs(crop / 127.5 - 1 - seen).max() <= 0.5 / 127.5 + 1e-6, "but for rounding to uint8"


def test_looks_change_nothing_else(data: Path) -> None:
    plain = dict.fromkeys(("colour", "light", "blur", "downscale", "noise", "jpeg"), 0.0)
    sample = Shards(data, "train")[0]
    drab, bright = (
        make_example(sample, 64, config, np.random.default_rng(4))
        for config in (
            DataConfig(**plain),
            DataConfig(colour=0.4, light=1, blur=1, downscale=1, noise=1, jpeg=1),
        )
    )
    for name, value in drab._asdict().items():
        same = torch.equal(torch.nan_to_num(value), torch.nan_to_num(getattr(bright, name)))
        assert same == (name != "image"), name
    crop = random_crop((64, 64), DataConfig(), np.random.default_rng(4))
    difference = drab.image.permute(1, 2, 0).numpy() - crop.image(sample.rgb, 64).astype(int)
    assert np.abs(difference).max() <= 1, "without augmentation it is the picture"


def test_queries_do_not_favour_what_moves(data: Path) -> None:
    """Over bodies they are spread like the bodies' pixels, however many futures move one."""
    shards = Shards(data, "train")
    config = DataConfig(queries_per_group=50, query_on_bodies=1, min_crop=1, flip=0, quarter_turn=0)
    for index in range(4):
        sample = shards[index]
        share = np.bincount(sample.bodies[sample.bodies > 0]) / (sample.bodies > 0).sum()
        found = np.zeros_like(share)
        for seed in range(20):
            example = make_example(sample, 32, config, np.random.default_rng(seed))
            x, y = normalised_to_pixels(example.query_pos.flatten(0, 2), (64, 64)).round().T
            found += np.bincount(sample.bodies[y.astype(int), x.astype(int)], minlength=len(share))
        assert found[0] == 0
        assert np.abs(found / found.sum() - share).max() < 0.03


def test_pokes_prefer_what_moves_only_in_informed_examples(data: Path) -> None:
    sample = Shards(data, "train")[1]
    area = sample.moving[:, sample.bodies].mean((1, 2))  # [F] share of pixels that move
    expected = {0.0: area.mean(), 1.0: (area > 0).mean()}
    for informed, share in expected.items():
        config = DataConfig(
            informed=informed, poke_on_moving=1, poke_noise=0, target_noise=0, min_crop=1
        )
        examples = (
            make_example(sample, 32, config, np.random.default_rng(seed)) for seed in range(200)
        )
        still = np.concatenate([(e.poke_flow == 0).all(-1).flatten() for e in examples])
        camera = sample.camera_static.mean()
        assert np.abs((1 - still.mean()) - (share * camera + 1 - camera)) < 0.07


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_the_share_of_moving_cameras(share: float | None) -> None:
    static = np.array([True] * 7 + [False])
    config, rng = DataConfig(moving_camera=share, futures_per_image=2), np.random.default_rng(0)
    shown = [choose_futures(static, None, config, rng) for _ in range(400)]
    moving = np.mean([~static[futures] for futures in shown])
    assert moving == pytest.approx({None: 1 / 8, 0.0: 0, 0.5: 0.5, 1.0: 1}[share], abs=0.05)
    for futures in shown:  # of those with a moving camera there is one only
        assert len(set(futures)) == 2 or not static[futures].any(), "no future twice"
    alike = [choose_futures(static[:7], None, config, np.random.default_rng(s)) for s in range(9)]
    plain = [np.random.default_rng(s).choice(7, 2, replace=False) for s in range(9)]
    assert np.array_equal(alike, plain), "nothing to choose from: as stored"


@pytest.mark.parametrize("share", [None, 0.5])
def test_far_futures_are_shown_more_often(share: float | None) -> None:
    static = np.array([True] * 3 + [False] * 2)
    config, rng = DataConfig(moving_camera=share), np.random.default_rng(0)
    weights = np.array([1.0, 2.0, 5.0, 1.0, 3.0])
    shown = [choose_futures(static, weights, config, rng)[0] for _ in range(4000)]
    still, moving = (0.5, 0.5) if share else (3 / 5, 2 / 5)
    expected = still * np.array([1 / 8, 2 / 8, 5 / 8, 0, 0])
    expected += moving * np.array([0, 0, 0, 1 / 4, 3 / 4])
    assert np.bincount(shown) / 4000 == pytest.approx(expected, abs=0.03)


def test_with_near_futures_examples_move_farther(data: Path) -> None:
    shards, plain = Shards(data, "train"), DataConfig(informed=1.0, first_poke_largest=1.0)

    def far(config: DataConfig) -> float:
        examples = [
            shards.example(i, CONFIG.model, config, np.random.default_rng(seed))
            for i in range(len(shards))
            for seed in range(12)
        ]
        return float(np.mean([e.poke_flow[0, 0].norm() for e in examples]))

    assert far(replace(plain, near_futures=0.01)) > 1.2 * far(plain)


def test_shards_know_their_origin(data: Path, tmp_path: Path) -> None:
    shards = Shards(data, "train")
    assert shards.generator == GENERATOR
    assert shards.worlds == [(shards[i].kind, shards[i].seed) for i in range(12)]
    assert len(set(shards.worlds)) == 3
    for file in data.glob("train-*"):
        shutil.copy(file, tmp_path)
    assert len(Shards(tmp_path, "train")) == 12, "still being made"
    assert Shards(tmp_path, "train").generator is None
    shutil.copy(data / "manifest-train.json", tmp_path)
    (tmp_path / "train-000000.tar").rename(tmp_path / "train-000007.tar")
    with pytest.raises(ValueError, match=r"missing \['train-000000.*not listed \['train-000007"):
        Shards(tmp_path, "train")
    manifest = json.loads((data / "manifest-train.json").read_text())
    (tmp_path / "manifest-train.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(ValueError, match="has format 1, expected"):
        Shards(tmp_path, "train")


def parameters(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "last.pt", weights_only=True)["learner"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train.Trainer(CONFIG, data, out).run()
    return out


def test_what_is_trained_sees_exactly_its_pokes(data: Path) -> None:
    """Each group of queries is answered as the model answers it, given its pokes alone."""
    batch = next(load_batches(ExampleDataset(Shards(data, "train"), CONFIG), range(3), 3, 0))
    learner = Learner(randomised(FlowPokeTransformer(CONFIG.model))).eval()
    image, visible = batch.image.float() / 127.5 - 1, torch.tensor(CONFIG.data.visible_pokes)
    with torch.no_grad():
        raw, _ = learner(image, batch, visible)
        features = learner.model.encode(image)
        pos, flow, queries, static = (
            x.flatten(0, 1)
            for x in (batch.poke_pos, batch.poke_flow, batch.query_pos, batch.camera_static)
        )
        for group, k in enumerate(visible.tolist()):
            alone = learner.model.forward_raw(
                features, pos[:, :k], flow[:, :k], queries[:, group], static
            )
            assert (raw[:, group] - alone).abs().max() < 1e-4
    assert (raw[:, 0] - raw[:, -1]).abs().max() > 1e-2, "pokes change the answers"


def test_resuming_is_exact(data: Path, run: Path, tmp_path: Path) -> None:
    """Two steps, a stop, and two more give the same weights as four."""
    first = train.Trainer(CONFIG, data, tmp_path)
    interrupted = load_batches(
        ExampleDataset(Shards(data, "train"), CONFIG), Share(4, 0, 4), 4, workers=0
    )
    train.set_training_mode(first.model)
    for _ in range(2):
        first._train_step(next(interrupted))
        first.step += 1
    first.save()
    train.Trainer(CONFIG, data, tmp_path).run()
    for key, value in parameters(run).items():
        assert torch.equal(value, parameters(tmp_path)[key]), key
    shipped, other = (load_file(out / "model.safetensors") for out in (run, tmp_path))
    for key, value in shipped.items():
        assert torch.equal(value, other[key]), key


def test_the_average_follows_the_weights(data: Path, tmp_path: Path) -> None:
    """What is saved as the model: by a tenth after the first step, to start with."""
    trainer = train.Trainer(CONFIG, data, tmp_path)
    before = [p.detach().clone() for p in trainer.learner.parameters()]
    dataset = ExampleDataset(Shards(data, "train"), CONFIG)
    trainer._train_step(next(load_batches(dataset, range(4), 4, workers=0)))
    moved = 0.0
    for old, new, mean in zip(
        before, trainer.learner.parameters(), trainer.average.parameters(), strict=True
    ):
        assert torch.allclose(mean, 0.1 * old + 0.9 * new, atol=1e-7)
        moved = max(moved, float((new - old).abs().max()))
    assert moved > 1e-5
    trainer.save()
    saved = load_file(tmp_path / "model.safetensors")
    for key, mean in trainer.average.model.state_dict().items():
        if key in saved:
            assert torch.equal(saved[key].float(), mean.to(saved[key].dtype).float()), key


def test_outliers_cost_no_more_than_a_uniform_component() -> None:
    nll = torch.tensor([-3.0, 0.0, 50.0])
    share = CONFIG.optim.outlier_share
    density = (1 - share) * torch.exp(-nll) + share / 4  # [-1, 1]^2 has the area 4
    assert share > 0
    assert torch.allclose(robust(nll, CONFIG), -density.log())


def test_checkpoints_of_earlier_versions_resume(data: Path, tmp_path: Path) -> None:
    """Their layout, written without Fabric, and a configuration without the keys of today."""
    torch.manual_seed(5)
    learner, average = (train.Learner(FlowPokeTransformer(CONFIG.model)) for _ in range(2))
    optimisers = train.make_optimisers(learner, CONFIG.optim)
    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimiser in optimisers:
        optimiser.step()
    state = {
        "learner": learner.state_dict(),
        "average": average.state_dict(),
        "optimisers": [o.state_dict() for o in optimisers],
        "step": 3,
        "cpu_seconds": 2.5,
    }
    torch.save(state, tmp_path / "last.pt")
    values = CONFIG.to_dict()
    del values["data"]["moving_camera"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    trainer = train.Trainer(CONFIG, data, tmp_path)
    assert (trainer.step, trainer.cpu_seconds) == (3, 2.5)
    assert trainer._state().keys() == state.keys() | {"images", "data"}
    for own, its in ((trainer.learner, learner), (trainer.average, average)):
        for key, value in its.state_dict().items():
            assert torch.equal(own.state_dict()[key], value), key
    momenta = (o.state_dict()["state"] for o in trainer.optimisers)
    for own, its in zip(momenta, (o["state"] for o in state["optimisers"]), strict=True):
        assert own.keys() == its.keys()
        for index, entry in its.items():
            assert all(torch.equal(own[index][name], value) for name, value in entry.items())
    trainer.run()
    assert trainer.step == 4


def test_the_run_leaves_a_usable_model(run: Path, data: Path) -> None:
    model = load_model(run / "model.safetensors")
    assert model.config == CONFIG.model
    lines = [json.loads(x) for x in (run / "validation.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4]
    assert all(np.isfinite(list(x.values())).all() for x in lines)
    assert RunConfig.load(run / "config.yaml") == CONFIG


@pytest.mark.parametrize("flow_dim", [2, 3])
def test_the_energy_score_is_that_of_samples(flow_dim: int) -> None:
    config = replace(CONFIG.model, flow_dim=flow_dim)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(50, config.raw_dim, generator=generator)
    target = 0.1 * torch.randn(50, flow_dim, generator=generator)
    log_weights, means, tril = mixture_parameters(raw, config)
    mixture = FlowMixture(log_weights.numpy(), means.numpy(), tril.numpy())
    x, y = np.split(mixture.sample(4000, np.random.default_rng(0)), 2)
    sampled = np.linalg.norm(np.concatenate([x, y]) - target.numpy(), axis=-1).mean(0)
    sampled -= np.linalg.norm(x - y, axis=-1).mean(0) / 2
    score = energy_score(raw, target, config).numpy()
    # the length of elongated Gaussians is an approximation
    np.testing.assert_allclose(score, sampled, rtol=0.25)
    assert np.corrcoef(score, sampled)[0, 1] > 0.98


@pytest.mark.parametrize(
    ("flow_dim", "mean_length"), [(2, np.sqrt(np.pi / 2)), (3, np.sqrt(8 / np.pi))]
)
def test_the_energy_score_of_a_round_gaussian_is_exact(flow_dim: int, mean_length: float) -> None:
    """About its target; ``mean_length`` is that of standard Gaussian vectors."""
    config = replace(CONFIG.model, flow_dim=flow_dim, components=1)
    raw = torch.zeros(1, config.raw_dim)  # so the off-diagonal entries are zero
    raw[:, 1 : 1 + flow_dim] = 2
    _, means, tril = mixture_parameters(raw, config)
    std = tril[0, 0, 0, 0].item()
    score = energy_score(raw, means[:, 0], config).item()
    # the difference of two draws is sqrt(2) times as long
    assert score == pytest.approx(std * mean_length * (1 - np.sqrt(2) / 2), rel=1e-6)


def test_the_energy_score_of_a_certain_prediction_is_its_error() -> None:
    config = replace(CONFIG.model, head="scaled")
    raw = torch.zeros(1, config.raw_dim)
    target = torch.tensor([[0.3, -0.4]])
    far, near = (energy_score(raw, s * target, config).item() for s in (20, 10))
    assert far - near == pytest.approx(5, rel=1e-3)


def test_training_learns(data: Path, tmp_path: Path) -> None:
    config = RunConfig.from_dict(
        {
            **CONFIG.to_dict(),
            "optim": {**CONFIG.to_dict()["optim"], "steps": 200, "validate_every": 200},
        }
    )
    trainer = train.Trainer(config, data, tmp_path)
    batch = trainer.validation.batches[0]
    before = trainer._loss(batch)[1].tolist()
    trainer.run()
    after = trainer._loss(batch)[1].tolist()
    assert after[0] < before[0] - 0.5, f"NLL {before[0]:.2f} -> {after[0]:.2f}"
    for name, old, new in zip(train.LOSSES[1:], before[1:], after[1:], strict=True):
        assert new < old, f"{name} {old:.4f} -> {new:.4f}"


def test_another_configuration_does_not_resume(data: Path, run: Path) -> None:
    values = CONFIG.to_dict()
    values["optim"] |= {"learning_rate": 0.5, "steps": 9}
    with pytest.raises(ValueError, match=r"optim.learning_rate: 0.001 -> 0.5\)"):
        train.Trainer(RunConfig.from_dict(values), data, run)


def test_a_run_does_not_go_on_with_other_data(data: Path, run: Path, tmp_path: Path) -> None:
    """The order of the images depends on their number."""
    for file in data.glob("val-*"):
        shutil.copy(file, tmp_path)
        for number in (0, 1):
            shutil.copy(file, tmp_path / file.name.replace("val-", f"train-{number}"))
    with pytest.raises(ValueError, match="started with 12 training images, received 24"):
        train.Trainer(CONFIG, tmp_path, run)
    for file in tmp_path.glob("train-1*"):
        file.unlink()
    with pytest.raises(ValueError, match="started with other training data of as many images"):
        train.Trainer(CONFIG, tmp_path, run)


def test_numbers_that_yaml_takes_for_words(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {learning_rate: 1e-3, steps: 3e2, decay_steps: 2e1}")
    config = RunConfig.load(file, ["data.near_futures=1e-2"])
    assert (config.optim.learning_rate, config.optim.steps) == (1e-3, 300)
    assert (config.optim.decay_steps, config.data.near_futures) == (20, 1e-2)
    assert isinstance(config.optim.steps, int)


def test_batch_statistics_need_a_pretrained_encoder(data: Path, tmp_path: Path) -> None:
    values = RunConfig.load("training/configs/tiny.yaml").to_dict()
    values["optim"] |= {"pretrained_encoder": False}
    with pytest.raises(ValueError, match=r"pretrained_encoder = true or .*, received neither"):
        train.Trainer(RunConfig.from_dict(values), data, tmp_path)


def larger(config: RunConfig, **model: object) -> FlowPokeTransformer:
    torch.manual_seed(1)
    return FlowPokeTransformer(replace(config.model, **model))


def test_a_larger_model_goes_on_where_the_smaller_one_stopped(tmp_path: Path) -> None:
    def convolutional(indices: list[int], **more: object) -> FlowPokeTransformer:
        kwargs = {"out_indices": indices, "feature_cfg": {"flatten_sequential": True}}
        return larger(
            CONFIG,
            encoder="tf_efficientnet_lite0",
            encoder_kwargs={"features_only": True, **kwargs},
            context_width=32,
            position_bands=2,
            **more,
        ).eval()

    small = convolutional([1, 2, 3], context_depth=1)
    save_model(small, tmp_path / "small.safetensors")
    model = convolutional([0, 1, 2, 3], context_depth=2, detail_width=8)
    train.start_from(model, str(tmp_path / "small.safetensors"))
    g = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=g) * 2 - 1
    asked = torch.rand(1, 2, 2, generator=g), torch.rand(1, 2, 2, generator=g)
    asked = *asked, torch.rand(1, 1, 4, 2, generator=g), torch.tensor([True]), torch.tensor([2])
    with torch.no_grad():
        found, expected = (m(m.encode(image), *asked) for m in (model, small))
    assert (found - expected).abs().max() < 1e-5


def test_a_run_goes_on_without_what_it_began_with(data: Path, run: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    shutil.copy(run / "model.safetensors", start)
    config = replace(CONFIG, optim=replace(CONFIG.optim, start_from=str(start)))
    first = train.Trainer(config, data, tmp_path / "run")
    first.save()
    start.unlink()
    again = train.Trainer(config, data, tmp_path / "run")
    for key, value in first.learner.state_dict().items():
        assert torch.equal(again.learner.state_dict()[key], value), key
    with pytest.raises(FileNotFoundError, match=r"no model .*start\.safetensors"):
        train.Trainer(config, data, tmp_path / "other")


def test_validation_is_the_same_for_every_seed_and_hides_no_nan(data: Path, tmp_path: Path) -> None:
    trainer = train.Trainer(CONFIG, data, tmp_path)
    one, other = (
        Validation(
            Shards(data, "val"),
            replace(CONFIG, optim=replace(CONFIG.optim, seed=seed)),
            trainer.fabric,
        )
        for seed in (1, 2)
    )
    for mine, its in zip(one.batches, other.batches, strict=True):
        for x, y in zip(mine, its, strict=True):
            assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
    assert [s.points[s.pokes].tolist() for s in one.scenes] == [
        s.points[s.pokes].tolist() for s in other.scenes
    ]

    def broken(batch: Example) -> tuple[torch.Tensor, torch.Tensor]:
        raw, logits = trainer._forward(trainer.learner, batch)
        raw[0, 0, :, 0] = torch.nan
        return raw, logits

    figures = one.figures(broken)
    assert all(np.isnan(figures[f"epe/{count}_pokes"]) for count in one.counts)
    assert all(np.isfinite(figures[f"no_motion_epe/{count}_pokes"]) for count in one.counts)


def test_a_gradient_that_is_not_finite_reaches_no_weight(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train.Trainer(CONFIG, data, tmp_path)
    before = copy.deepcopy(trainer.learner.state_dict())
    backward = trainer.fabric.backward

    def broken(loss: torch.Tensor) -> None:
        backward(loss)
        next(p for p in trainer.learner.parameters() if p.grad is not None).grad.fill_(torch.nan)

    monkeypatch.setattr(trainer.fabric, "backward", broken)
    dataset = ExampleDataset(Shards(data, "train"), CONFIG)
    with pytest.raises(FloatingPointError, match="gradient's norm is nan at step 0"):
        trainer._train_step(next(load_batches(dataset, range(4), 4, workers=0)))
    for key, value in trainer.learner.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"min_crop": 0}, "min_crop must be > 0, received 0"),
        ("optim", {"seed": -1}, "seed must be .*received -1"),
        ("optim", {"seed": 1.5}, "seed must be .*received 1.5"),
        ("optim", {"start_from": 3}, "start_from must be a name or a file, received 3"),
    ],
)
def test_settings_that_would_fail_later_are_refused(
    section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict({section: values})


def test_another_number_of_components_gets_a_new_last_layer(run: Path) -> None:
    model = larger(CONFIG, components=1)
    before = copy.deepcopy(model.state_dict())
    train.start_from(model, str(run / "model.safetensors"))
    start = load_model(run / "model.safetensors").state_dict()
    last = {"head.5.weight", "head.5.bias"}
    assert last < set(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in last else start[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 1}, "layers.1.* which the run's model has not"),
        ({"width": 64}, "has shape"),
        ({"position_bands": 2}, "position_bands = 0, the run's model 2"),
        ({"flow_prescale": 0.7}, "flow_prescale = 0.5, the run's model 0.7"),
    ],
)
def test_misfits_to_start_from_are_named(run: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.start_from(larger(CONFIG, **change), str(run / "model.safetensors"))


def test_only_matrices_of_blocks_are_trained_by_muon() -> None:
    config = RunConfig.load("training/configs/tiny.yaml", ["optim.optimiser=muon"])
    learner = train.Learner(FlowPokeTransformer(config.model))
    names = {id(p): name for name, p in learner.named_parameters()}
    adamw, muon = train.make_optimisers(learner, config.optim)
    both = [{names[id(p)] for g in o.param_groups for p in g["params"]} for o in (adamw, muon)]
    assert both[0] | both[1] == set(names.values())
    assert not both[0] & both[1]
    kinds = {name.split(".")[-2] for name in both[1]}
    assert kinds == {
        *("qkv", "out", "ffn_up", "ffn_down"),  # of the encoder's context
        *("self_qkv", "self_out", "cross_q", "cross_kv"),
    }


@pytest.mark.parametrize(("decay", "falls_from"), [(None, 100), (300, 700)])
def test_learning_rate(decay: int | None, falls_from: int) -> None:
    optim = replace(CONFIG.optim, steps=1000, warmup_steps=100, decay_steps=decay)
    rates = np.array([train.learning_rate_factor(step, optim) for step in range(1001)])
    assert rates[0] == pytest.approx(0.01)
    assert (np.diff(rates[:100]) > 0).all()
    assert rates[100 : falls_from + 1] == pytest.approx(1)
    assert (np.diff(rates[falls_from + 1 :]) < 0).all()
    assert rates[1000] == pytest.approx(0.01)
    short = replace(optim, steps=150, warmup_steps=100, decay_steps=300)
    assert train.learning_rate_factor(100, short) == pytest.approx(1), "it falls from its peak"


def test_only_chosen_stages_are_trained() -> None:
    model = FlowPokeTransformer(RunConfig.load("training/configs/tiny.yaml").model)
    train.freeze_stages(model, 2)
    trained = {
        n.split(".")[0]: p.requires_grad for n, p in model.encoder.backbone.named_parameters()
    }
    assert trained == {
        "conv_stem": False,
        "bn1": False,
        "blocks_0": False,
        "blocks_1": False,
        **dict.fromkeys(("blocks_2", "blocks_3", "blocks_4"), True),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "modle"),
        ({"data": {"poke": 3}}, "poke"),
        ({"data": {"futures_per_image": 0}}, "futures_per_image must be a whole number >= 1"),
        ({"data": {"horizon_frames": 0}}, "horizon_frames must be a whole number >= 1"),
        ({"data": {"moving_camera": 1.5}}, "moving_camera must be in .* received 1.5"),
        ({"data": {"near_futures": 0}}, "near_futures must be > 0, received 0"),
        ({"data": {"visible_pokes": 1.5}}, "visible_pokes must be counts >= 0, received 1.5"),
        ({"data": {"flip": 7}}, r"flip must be in \[0, 1\], received 7"),
        ({"data": {"min_crop": 2}}, r"min_crop must be in \[0, 1\], received 2"),
        ({"optim": {"steps": 0}}, "steps must be a whole number >= 1, received 0"),
        ({"optim": {"batch_size": 32.5}}, "batch_size must be a whole number .* received 32.5"),
        ({"optim": {"gradient_clip": 0}}, "gradient_clip must be > 0, received 0"),
        ({"optim": {"learning_rate": -1}}, r"learning_rate must be in \[0, inf\], received -1"),
        ({"optim": {"segment_weight": 0.5}}, "segment_weight = 0.5 needs segment_points > 0"),
        ({"optim": {"precision": "fp8"}}, "fp8"),
        ({"optim": {"learning_rate": "fast"}}, "learning_rate must be a number .* received 'fast'"),
        ({"optim": {"steps": "1.5e0"}}, "steps must be a number .* received '1.5e0'"),
        (
            {"optim": {"validate_every": 0}},
            "validate_every must be a whole number >= 1, received 0",
        ),
    ],
)
def test_configuration_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-NUMBER\.tar"):
        Shards(tmp_path, "train")


def test_a_run_from_the_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quick by the documented command; a user's mistake is told in one line."""

    def fpt(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["train", *map(str, arguments)])
        return int(ended.value.code or 0)

    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(CONFIG.to_dict()))
    common = "--config", config, "--data", data, "--out", tmp_path / "run"
    assert fpt(*common, "--quick", "optim.seed=3") == 0
    made = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert (made.optim.steps, made.optim.batch_size, made.optim.seed) == (4, 4, 3)
    assert load_model(tmp_path / "run" / "model.safetensors").config == CONFIG.model
    capsys.readouterr()
    for arguments, message in (
        ((*common, "optim.seed=4", "--quick"), "optim.seed: 3 -> 4"),
        (
            (*common[:2], "--data", tmp_path, "--out", tmp_path / "new"),
            "no shards train-NUMBER.tar",
        ),
        (("--config", tmp_path / "none.yaml", *common[2:]), "none.yaml"),
    ):
        assert fpt(*arguments) == 2
        assert message in capsys.readouterr().err
