# SPDX-License-Identifier: MIT
"""The model library: coordinates, mixtures, the model's structure, checkpoints, the predictor."""

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref
import zipfile
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from closeness import assert_close, assert_mixtures_close
from compilers import needs_compiler
from random_weights import randomised
from scenes_apart import assert_scenes_apart
from torch import nn

from fpt_model import (
    CheckpointError,
    FlowMixture,
    FlowPokeTransformer,
    FlowPredictor,
    FPTConfig,
    checkpoint,
    encoder,
    geometry,
    load_model,
    mixture,
    packed,
    save_model,
)
from fpt_model.backends import Precision
from fpt_model.engine import BackendError, TorchEngine, fold_batch_norms, prepare
from fpt_model.layers import QKV, position_features
from fpt_model.model import mixture_parameters, negative_log_likelihood
from fpt_model.packed import (
    OneDNNLinear,
    OneDNNQKV,
    PackedLinear,
    PackedQKV,
    can_pack,
    multiply_by_onednn,
    pack,
)
from fpt_model.predictor import Order

SMALL = FPTConfig(
    name="small",
    encoder="vit_tiny_patch16_224",
    encoder_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    image_size=32,
    width=48,
    depth=2,
    head_dim=16,
    fit="stretch",
)


CONVOLUTIONAL = dataclasses.replace(
    SMALL,
    name="convolutional",
    encoder="tf_efficientnet_lite0",
    encoder_kwargs={
        "features_only": True,
        "out_indices": [0, 1, 2, 3],
        "feature_cfg": {"flatten_sequential": True},
    },
    context_width=32,
    detail_width=8,
    position_bands=3,
)


@pytest.fixture(scope="module", params=[SMALL, CONVOLUTIONAL], ids=lambda config: config.name)
def model(request: pytest.FixtureRequest) -> FlowPokeTransformer:
    return randomised(FlowPokeTransformer(request.param))


@pytest.fixture(scope="module")
def predictor(model: FlowPokeTransformer) -> FlowPredictor:
    return FlowPredictor(model)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


class TestGeometry:
    def test_pixel_centres(self) -> None:
        """A 4 x 2 image: the first pixel's centre is 1/8, 1/4 of the way in."""
        assert geometry.pixels_to_normalised([0, 0], (2, 4)).tolist() == [0.125, 0.25]
        assert geometry.pixels_to_normalised([3.5, 1.5], (2, 4)).tolist() == [1.0, 1.0]
        assert geometry.displacement_pixels_to_normalised([1, 1], (2, 4)).tolist() == [0.25, 0.5]

    @pytest.mark.parametrize("size", [(480, 640), (720, 405), (100, 100), (131, 150)])
    @pytest.mark.parametrize("fit", ["crop", "stretch"])
    def test_round_trip(self, size: tuple[int, int], fit: geometry.Fit) -> None:
        xy = np.random.default_rng(0).uniform(-50, 700, (100, 2))
        view = geometry.ModelView(*size, fit)
        model_xy = view.to_model(geometry.pixels_to_normalised(xy, size))
        left, top, width, height = view.box
        assert_close(model_xy * [width, height] + [left, top] - 0.5, xy, 1e-6)
        d = view.displacement_to_normalised(view.displacement_to_model(xy / 100))
        assert_close(d, xy / 100, 1e-9)

    @pytest.mark.parametrize("wide", [True, False])
    def test_a_cropping_model_sees_the_middle(self, wide: bool) -> None:
        config = dataclasses.replace(CONVOLUTIONAL, fit="crop")
        image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        middle = image[:, 8:56]
        if not wide:
            image, middle = image.swapaxes(0, 1), middle.swapaxes(0, 1)
        assert torch.equal(encoder.preprocess(image, config), encoder.preprocess(middle, config))

    def test_crop_maps_its_border_to_the_unit_square(self) -> None:
        view = geometry.ModelView(480, 640, "crop")
        assert view.box == (80, 0, 480, 480)
        assert_close(view.to_model([80 / 640, 0]), [0, 0], 1e-12)
        assert_close(view.to_model([560 / 640, 1]), [1, 1], 1e-12)
        # 48 px are a tenth of the crop, whichever axis
        assert_close(view.displacement_to_model([48 / 640, 48 / 480]), [0.1, 0.1], 1e-12)

    def test_crop_offset_rounds_half_to_even(self) -> None:
        assert geometry.ModelView(150, 131, "crop").box[1] == 10  # 9.5
        assert geometry.ModelView(145, 132, "crop").box[1] == 6  # 6.5

    def test_grid_is_pixel_centres(self) -> None:
        h, w = 3, 5
        expected = geometry.pixels_to_normalised(
            np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).reshape(-1, 2), (h, w)
        )
        assert_close(geometry.grid((h, w)), expected, 1e-12)

    @pytest.mark.parametrize("size", [(0, 5), (5, -1)])
    def test_rejects_empty_images(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=str(size[0])):
            geometry.pixels_to_normalised([0, 0], size)


def random_mixture(seed: int = 0, shape: tuple[int, ...] = (6,), d: int = 2) -> FlowMixture:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, 4))
    tril = np.tril(rng.normal(0, 0.3, (*shape, 4, d, d)), -1)
    tril += np.exp(rng.normal(-1, 0.3, (*shape, 4, d)))[..., None] * np.eye(d)
    log_weights = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return FlowMixture(log_weights, rng.normal(size=(*shape, 4, d)), tril)


class TestMixture:
    @pytest.mark.parametrize("d", [2, 3])
    def test_the_median_has_the_least_expected_error(self, d: int) -> None:
        """To the motion, which one component knows exactly, without the noise that it came with."""
        motion = random_mixture(d=d)
        motion.scale_tril[:, 0] = 1e-6 * np.eye(d)
        draws = motion.sample(20_000, np.random.default_rng(0))
        noisy = motion.component_covariances() + 0.3**2 * np.eye(d)
        mix = FlowMixture(motion.log_weights, motion.means, np.linalg.cholesky(noisy))

        def expected_error(x: np.ndarray) -> np.ndarray:
            return np.linalg.norm(draws - x, axis=-1).mean(0)

        least = expected_error(mix.median())
        for other in (mix.mean(), mix.mode(), mix.median() + 0.1, mix.median() - 0.1):
            assert (least <= expected_error(other) + 0.005).all()
        assert np.array_equal(mix.reduce("median"), mix.median())
        with pytest.raises(ValueError, match="received 'max'"):
            mix.reduce("max")

    @pytest.mark.parametrize("d", [2, 3])
    def test_the_median_is_at_the_least_of_its_bound(self, d: int) -> None:
        """Also where components are narrow, whose cusps Newton's step alone would jump over."""
        rng = np.random.default_rng(d)
        for width in (1.0, 1e-2, 1e-4):
            wide = random_mixture(d=d)
            mix = FlowMixture(wide.log_weights, wide.means, width * wide.scale_tril)
            spread = np.square(mix.scale_tril).sum((-2, -1))  # [N, K]
            spread -= (1 - mixture._MEDIAN_FLOOR) * spread.min(-1, keepdims=True)

            def bound(x: np.ndarray, mix: FlowMixture = mix, spread: Any = spread) -> np.ndarray:
                squares = np.square(mix.means - x[:, None]).sum(-1)
                return (mix.weights * np.sqrt(squares + spread)).sum(-1)

            found = mix.median()
            for size in np.geomspace(1e-5, 1, 11):
                for _ in range(20):
                    other = found + size * rng.normal(size=found.shape)
                    assert (bound(found) <= bound(other) * (1 + 1e-9)).all()

    def test_the_median_without_a_known_last_axis_is_that_of_the_others(self) -> None:
        means = np.array([[[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]] * 3)
        mix = FlowMixture(
            np.log([[0.1, 0.9]] * 3), means, np.broadcast_to(0.01 * np.eye(3), (3, 2, 3, 3))
        )
        found = mix.scaled_last(np.array([1.0, np.nan, 2.0])).median()
        np.testing.assert_allclose(
            found, [[5, 6, 7], [5, 6, np.nan], [5, 6, 14]], atol=1e-3, equal_nan=True
        )

    def test_the_median_of_moves_or_stays_is_the_likelier(self) -> None:
        means = np.array([[0.0, 0.0], [0.5, 0.1]])
        tril = np.broadcast_to(0.005 * np.eye(2), (3, 2, 2, 2))
        weights = np.array([[0.6, 0.4], [0.4, 0.6], [0.99, 0.01]])
        mix = FlowMixture(np.log(weights), np.broadcast_to(means, (3, 2, 2)), tril)
        assert_close(mix.median(), means[[0, 1, 0]], 0.02)

    def test_dimensions_are_not_mixed(self) -> None:
        planar, spatial = random_mixture(), random_mixture(d=3)
        for p, q in ((planar, spatial), (spatial, planar)):
            with pytest.raises(ValueError, match=f"received {p.dims} and {q.dims}"):
                p.kl(q)
        with pytest.raises(ValueError, match=r"motion must be \[..., 2\], received \(6, 1\)"):
            planar.log_prob(np.zeros((6, 1)))

    @pytest.mark.parametrize("d", [2, 3])
    def test_log_prob_equals_torch(self, d: int) -> None:
        mix = random_mixture(d=d)
        x = np.random.default_rng(1).normal(size=(6, d))
        reference = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=torch.from_numpy(mix.log_weights)),
            torch.distributions.MultivariateNormal(
                torch.from_numpy(mix.means), scale_tril=torch.from_numpy(mix.scale_tril)
            ),
        )
        assert_close(mix.log_prob(x), reference.log_prob(torch.from_numpy(x)).numpy(), 1e-10)
        assert_close(mix.mean(), reference.mean.numpy(), 1e-12)
        assert_close(mix.std() ** 2, reference.variance.numpy(), 1e-12)

    def test_samples_have_the_moments(self) -> None:
        mix = random_mixture()
        draws = mix.sample(200_000, np.random.default_rng(0))
        assert_close(draws.mean(0), mix.mean(), 0.02)
        centred = draws - draws.mean(0)
        assert_close(
            np.einsum("nqi,nqj->qij", centred, centred) / len(draws), mix.covariance(), 0.04
        )

    def test_kl_against_quadrature(self) -> None:
        p, q = random_mixture(0), random_mixture(1)
        axis = np.linspace(-8, 8, 321)
        points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 2)
        wide_p = FlowMixture(*(x[None] for x in (p.log_weights, p.means, p.scale_tril)))
        wide_q = FlowMixture(*(x[None] for x in (q.log_weights, q.means, q.scale_tril)))
        log_p = wide_p.log_prob(points)
        cell = (axis[1] - axis[0]) ** 2
        true = (np.exp(log_p) * (log_p - wide_q.log_prob(points))).sum(0) * cell
        estimate = p.kl(q, method="monte_carlo", samples=100_000)
        assert_close(estimate, true, 0.05 * true.max())

    def test_sampled_kl_broadcasts_as_the_matched_does(self) -> None:
        """Of single Gaussians, of which the matched is exact."""
        points = random_mixture()
        several = FlowMixture(np.zeros((6, 1)), points.means[:, :1], points.scale_tril[:, :1])
        one, many = several[0], several[1:4]
        rows = FlowMixture(*(array[:, None] for array in vars(several[4:]).values()))
        for p, q in ((one, many), (many, one), (rows, many), (many, rows)):
            exact = p.kl(q)
            assert_close(p.kl(q, "monte_carlo", samples=40_000), exact, 0.05 * exact.max())
            assert p.kl(q, "monte_carlo", samples=3).shape == exact.shape  # as many as points
        with pytest.raises(ValueError, match="samples must be >= 1, received 0"):
            one.kl(many, "monte_carlo", samples=0)

    def test_matched_kl(self) -> None:
        """Exact for one component; sums over matched pairs of well separated ones."""
        p, q = random_mixture(0), random_mixture(1)
        assert_close(p.kl(p), np.zeros(6), 1e-12)
        single_p, single_q = (
            FlowMixture(np.zeros((6, 1)), x.means[:, :1], x.scale_tril[:, :1]) for x in (p, q)
        )
        estimate = single_p.kl(single_q, method="monte_carlo", samples=100_000)
        matched = single_p.kl(single_q)
        assert_close(matched, estimate, 0.02 * matched.max())
        far = np.arange(4)[:, None] * [100.0, 0.0]
        apart_p, apart_q = (FlowMixture(x.log_weights, x.means + far, x.scale_tril) for x in (p, q))
        pairs = apart_p.component_kl(apart_q)[:, range(4), range(4)]
        expected = (p.weights * (pairs + p.log_weights - q.log_weights)).sum(-1)
        assert_close(apart_p.kl(apart_q), expected, 1e-9)
        with np.errstate(divide="ignore"):  # a component that underflowed
            log_weights = np.log(np.eye(4)[np.zeros(6, int)])
        one = FlowMixture(log_weights, p.means, p.scale_tril)
        assert_close(one.kl(q), (p.component_kl(q)[:, 0] - q.log_weights).min(-1), 1e-9)
        assert_close(one.kl(one), np.zeros(6), 1e-9)

    @pytest.mark.parametrize("std", [1e-4, 1.0])
    def test_kl_of_almost_singular_gaussians(self, std: float) -> None:
        """Against the closed form in rational numbers: no digit of the inputs is lost in it."""
        slopes, narrow = (0.999999, -0.5), 1e-6
        trils = np.array([[[std, 0], [slope * std, narrow * std]] for slope in slopes])
        means = np.array([[0.0, 0.0], [0.3 * std, -2 * std]])
        p, q = (FlowMixture(np.zeros(1), means[i, None], trils[i, None]) for i in (0, 1))
        for one, other in ((p, q), (q, p)):
            (a, _), (b, c) = ([Fraction(float(x)) for x in row] for row in one.scale_tril[0])
            (d, _), (e, f) = ([Fraction(float(x)) for x in row] for row in other.scale_tril[0])
            x, y = (
                Fraction(float(i)) - Fraction(float(j))
                for i, j in zip(other.means[0], one.means[0], strict=True)
            )
            squares = (a / d) ** 2 + (c / f) ** 2 + ((b - e * a / d) / f) ** 2
            squares += (x / d) ** 2 + ((y - e * x / d) / f) ** 2
            expected = float(squares - 2) / 2 + math.log(d * f / (a * c))
            assert float(one.kl(other)) == pytest.approx(expected, rel=1e-9)

    def test_modes_are_sorted_and_scaling_is_linear(self) -> None:
        mix = random_mixture()
        modes = mix.modes()
        assert np.all(np.diff(modes.log_weights, axis=-1) <= 0)
        assert_close(modes.mean(), mix.mean(), 1e-12)
        assert_close(mix.mode(), modes.means[:, 0], 0)
        scaled = mix.scaled(640, 480)
        assert_close(scaled.mean(), mix.mean() * [640, 480], 1e-9)
        assert_close(scaled.std(), mix.std() * [640, 480], 1e-9)

    def test_entropy_of_a_gaussian(self) -> None:
        mix = FlowMixture(np.zeros(1), np.zeros((1, 2)), 0.1 * np.eye(2)[None])
        expected = np.log(2 * np.pi * np.e * 0.01)
        assert abs(mix.entropy(samples=20_000) - expected) < 0.03

    def test_rejects_inconsistent_shapes(self) -> None:
        with pytest.raises(ValueError, match="received shapes"):
            FlowMixture(np.zeros((5, 3)), np.zeros((5, 4, 2)), np.zeros((5, 4, 2, 2)))
        with pytest.raises(ValueError, match="2 positive factors"):
            random_mixture().scaled(1.0)


class TestModel:
    def test_groups_see_exactly_their_pokes(self, model: FlowPokeTransformer) -> None:
        """Training's group g equals a prediction with the first g pokes."""
        g = torch.Generator().manual_seed(0)
        image = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
        pos, flow = torch.rand(2, 5, 2, generator=g), torch.randn(2, 5, 2, generator=g) * 0.2
        queries = torch.rand(2, 5, 3, 2, generator=g)
        static = torch.tensor([True, False])
        with torch.no_grad():
            features = model.encode(image)
            together = model(features, pos, flow, queries, static, torch.arange(5))
            for k in range(5):
                alone = model.forward_raw(features, pos[:, :k], flow[:, :k], queries[:, k], static)
                assert_close(together[:, k].numpy(), alone.numpy(), 1e-5)

    def test_images_serve_consecutive_rows(self, model: FlowPokeTransformer) -> None:
        """Three futures of each of two images equal the futures of each image by itself."""
        g = torch.Generator().manual_seed(0)
        image = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
        pos, flow = torch.rand(6, 2, 2, generator=g), torch.randn(6, 2, 2, generator=g) * 0.2
        queries, static = torch.rand(6, 3, 4, 2, generator=g), torch.arange(6) % 2 == 0
        with torch.no_grad():
            asked, visible = (pos, flow, queries, static), torch.arange(3)
            together = model(model.encode(image), *asked, visible)
            for i in range(2):
                own = slice(3 * i, 3 * i + 3)
                features = model.encode(image[i : i + 1])
                alone = model(features, *(x[own] for x in asked), visible)
                assert_close(together[own].numpy(), alone.numpy(), 1e-4)
        assert (together[:3] - together[3:]).abs().max() > 1e-2, "the images differ"

    def test_context_reaches_across_the_image(self) -> None:
        """What a cell of the memory says depends on far cells, as does the map of details; that in
        between is the backbone's own and sees near ones only."""
        model = randomised(FlowPokeTransformer(dataclasses.replace(CONVOLUTIONAL, image_size=256)))
        image = torch.zeros(1, 3, 256, 256)
        changed = image.clone()
        changed[..., 240:, 240:] = 1
        with torch.no_grad():
            pairs = zip(model.encode(image).maps, model.encode(changed).maps, strict=True)
            context, fine, detail = ((a - b).abs().amax(1)[0] for a, b in pairs)
        assert [len(x) for x in (context, fine, detail)] == [32, 64, 128]
        assert detail[:16, :16].min() > 0
        assert fine[:32, :32].max() == 0
        assert fine.max() > 0
        assert context[:16, :16].min() > 0

    def test_position_features(self) -> None:
        pos = torch.tensor([[0.75, 0.5], [0.0, 1.0]])
        s = np.array([[0.5, 0.0], [-1.0, 1.0]])
        angles = np.stack([np.pi * s[:, 0], 2 * np.pi * s[:, 0]], -1)
        angles = np.concatenate([angles, np.stack([np.pi * s[:, 1], 2 * np.pi * s[:, 1]], -1)], -1)
        expected = np.concatenate([s, np.sin(angles), np.cos(angles)], -1)
        assert_close(position_features(pos, 2).numpy(), expected, 1e-6)
        assert position_features(pos, 0).shape == (2, 0)
        config = dataclasses.replace(SMALL, position_bands=2)
        assert config.position_dim == expected.shape[1]

    def test_the_flag_matters(self, model: FlowPokeTransformer) -> None:
        features = model.encode(torch.zeros(1, 3, 32, 32))
        none, query = torch.empty(1, 0, 2), torch.rand(1, 4, 2)
        moving, static = (
            model.forward_raw(features, none, none, query, torch.tensor([flag]))
            for flag in (False, True)
        )
        assert (moving - static).abs().max() > 1e-3

    def test_likelihood_equals_the_mixture(self) -> None:
        raw = torch.randn(7, SMALL.raw_dim, generator=torch.Generator().manual_seed(0))
        target = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
        mix = FlowMixture(*(t.numpy() for t in mixture_parameters(raw, SMALL)))
        nll = negative_log_likelihood(raw, target, SMALL)
        assert_close(nll.numpy(), -mix.log_prob(target.numpy()), 1e-10)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("width", 50),
            ("flow_dim", 4),
            ("position_bands", -1),
            ("depth", 0),
            ("min_std", 0.0),
            ("fit", "pad"),
            ("min_std", float("inf")),
            ("min_std", 10**400),
            ("flow_prescale", "x"),
            ("encoder", 3),
            ("sample_align_corners", "no"),
            ("image_mean", (1, 2)),
            ("image_std", (0.2, 0, 0.2)),
        ],
    )
    def test_configuration_names_the_bad_value(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=f"{field}.*{re.escape(str(value))}"):
            FPTConfig.from_dict({**SMALL.to_dict(), field: value})

    @pytest.mark.parametrize(
        "change", [{"encoder": "hf-hub:x/y"}, {"encoder_kwargs": {"checkpoint_path": "x.pth"}}]
    )
    def test_configuration_loads_nothing(self, change: dict) -> None:
        """An untrusted file's configuration reaches timm, which can download and unpickle."""
        with pytest.raises(ValueError, match="must load nothing"):
            FPTConfig.from_dict({**SMALL.to_dict(), **change})

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(BackendError, match="device 'cuda' cannot be used"):
            FlowPredictor(FlowPokeTransformer(SMALL), device="cuda")

    @pytest.mark.parametrize("kwargs", [[], {"num_heads": 5}, {"num_heads": 0}, {"act_layer": "x"}])
    def test_a_file_whose_encoder_cannot_be_built(self, tmp_path: Path, kwargs: Any) -> None:
        save_model(FlowPokeTransformer(SMALL), tmp_path / "good.safetensors")
        with safetensors.safe_open(tmp_path / "good.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata())
        (key,) = (k for k, v in metadata.items() if "encoder_kwargs" in v)
        metadata[key] = json.dumps(json.loads(metadata[key]) | {"encoder_kwargs": kwargs})
        safetensors.torch.save_file(tensors, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
            load_model(tmp_path / "bad.safetensors")

    def test_building_leaves_the_configuration_alone(self) -> None:
        """timm writes into nested arguments."""
        before = json.dumps(CONVOLUTIONAL.to_dict())
        FlowPokeTransformer(CONVOLUTIONAL)
        assert json.dumps(CONVOLUTIONAL.to_dict()) == before

    def test_configuration_rejects_unknown_keys(self) -> None:
        with pytest.raises(ValueError, match="widht"):
            FPTConfig.from_dict({"widht": 3})


class TestPredictor:
    POS, FLOW = [[0.3, 0.6], [0.7, 0.2]], [[0.1, 0.0], [0.0, -0.1]]

    def test_order_chunks_and_batches_do_not_matter(
        self,
        model: FlowPokeTransformer,
        predictor: FlowPredictor,
        image: np.ndarray,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        scene = predictor.encode(image)
        queries = np.random.default_rng(0).random((50, 2))
        whole = predictor.predict(scene, self.POS, self.FLOW, queries)
        order = np.random.default_rng(1).permutation(50)
        permuted = predictor.predict(scene, self.POS, self.FLOW, queries[order])
        assert_mixtures_close(permuted, whole[order])
        batch = predictor.predict_batch(
            scene, [self.POS, self.POS[::-1]], [self.FLOW, self.FLOW[::-1]], queries
        )
        assert_mixtures_close(batch[0], whole)
        assert np.abs(batch[1].means - whole.means).max() > 1e-4, "hypotheses are different"
        monkeypatch.setattr("fpt_model.engine._PASS", 7 * model.config.width)
        assert_mixtures_close(predictor.predict(scene, self.POS, self.FLOW, queries), whole)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_two_scenes_at_once(
        self, model: FlowPokeTransformer, precision: Precision, image: np.ndarray
    ) -> None:
        predictor = FlowPredictor(model, precision=precision)
        assert_scenes_apart(predictor, [image, image[::-1].copy()], [geometry.grid((5, 6))])

    def test_known_pokes_are_not_run_again(
        self, model: FlowPokeTransformer, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever was asked before, the answer is that of a fresh scene."""
        predictor, run = FlowPredictor(model), TorchEngine.run
        ran: dict[int, list[int]] = {}  # new pokes of each call, by scene

        def counted(self: TorchEngine, *arguments: Any) -> Any:
            ran.setdefault(id(arguments[0]), []).append(arguments[2].shape[1])
            return run(self, *arguments)

        monkeypatch.setattr(TorchEngine, "run", counted)
        queries = geometry.grid((3, 4))
        pos, flow = np.random.default_rng(0).random((2, 5, 2))
        asked = predictor.encode(image)
        for count, static in ((1, True), (3, True), (3, False), (5, True), (0, True), (2, True)):
            args = (pos[:count], flow[:count], queries, static)
            fresh = predictor.predict(predictor.encode(image), *args)
            assert_mixtures_close(predictor.predict(asked, *args), fresh, 1e-5)
        assert ran[id(asked.features)] == [1, 2, 3, 2, 0, 2]
        changed = predictor.predict(asked, pos[:2], -flow[:2], queries)
        fresh = predictor.predict(predictor.encode(image), pos[:2], -flow[:2], queries)
        assert_mixtures_close(changed, fresh, 1e-5)

    def test_tokens_of_many_queries_are_kept(
        self, model: FlowPokeTransformer, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For the scene's next pokes, or none; the answer is that of a fresh scene."""
        predictor, rng = FlowPredictor(model), np.random.default_rng(0)
        monkeypatch.setattr("fpt_model.engine._KEPT", 12)
        pos, flow = rng.random((2, 3, 2))
        asked = predictor.encode(image)
        kept = []
        for count, queries in ((2, (3, 4)), (0, (3, 4)), (3, (3, 4)), (1, (4, 4)), (1, (2, 4))):
            args = (pos[:count], flow[:count], geometry.grid(queries))
            monkeypatch.setattr("fpt_model.engine._KEPT", 10**9)
            fresh = predictor.predict(predictor.encode(image), *args)
            monkeypatch.setattr("fpt_model.engine._KEPT", 12)
            assert_mixtures_close(predictor.predict(asked, *args), fresh, 1e-5)
            assert asked.features.last is not None
            kept.append(asked.features.last[1])
        assert kept[0] is kept[1] is kept[2] is not kept[3]
        assert kept[3] is kept[4]  # fewer queries are not kept, nor looked for

    def test_a_scene_is_for_the_predictor_that_made_it(
        self, predictor: FlowPredictor, model: FlowPokeTransformer, image: np.ndarray
    ) -> None:
        """Another's features, and what it was asked before, would be taken for one's own."""
        other = FlowPredictor(model)
        scene = other.encode(image)
        other.influence(scene, self.POS, self.FLOW, [3, 4])  # type: ignore[arg-type]
        for ask in (
            lambda: predictor.predict(scene, self.POS, self.FLOW, self.POS),
            lambda: predictor.unconditional(scene, (3, 4)),
            lambda: next(predictor.sample_stepwise(scene, self.POS, self.FLOW, self.POS)),
        ):
            with pytest.raises(ValueError, match="encoded by another predictor"):
                ask()

    def test_read_only_images_are_taken_without_a_warning(
        self, predictor: FlowPredictor, image: np.ndarray
    ) -> None:
        locked = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predictor.encode(locked)

    @pytest.mark.parametrize("order", ["random", "given"])
    def test_joint_samples(self, predictor: FlowPredictor, image: np.ndarray, order: str) -> None:
        scene, queries = predictor.encode(image), geometry.grid((2, 3))
        state = torch.get_rng_state()
        args = (scene, self.POS, self.FLOW, queries)
        drawn = predictor.sample(*args, num_samples=3, seed=5, order=order)
        assert drawn.shape == (3, 6, 2)
        assert_close(predictor.sample(*args, num_samples=2, seed=5, order=order), drawn[:2], 1e-5)
        assert (
            np.abs(predictor.sample(*args, num_samples=1, seed=6, order=order) - drawn[:1]).max()
            > 1e-3
        )
        assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
        assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
        steps = predictor.sample_stepwise(*args, num_samples=3, seed=5, order=order)
        assert [next(steps) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(StopIteration) as end:
            next(steps)
        np.testing.assert_array_equal(end.value.value, drawn)
        asked = predictor.encode(image)
        for few in (0, 1):
            predictor.predict(asked, self.POS[:few], self.FLOW[:few], queries)
        again = predictor.sample(asked, *args[1:], num_samples=3, seed=5, order=order)
        np.testing.assert_array_equal(again, drawn, "what was asked before changes the draws")
        for bad, message in (
            ({"seed": -1}, "seed must be an integer >= 0, received -1"),
            ({"seed": 1.5}, r"seed must be an integer >= 0, received 1\.5"),
            ({"num_samples": 0}, "num_samples must be an integer >= 1, received 0"),
            ({"order": [0, 1]}, r'order must be "random" or "given", received \[0, 1\]'),
        ):
            with pytest.raises(ValueError, match=message):
                predictor.sample(*args, **bad)
        with pytest.raises(ValueError, match=r"reduce must be one of .*'sample'.*received 'most'"):
            predictor.dense(scene, self.POS, self.FLOW, reduce="most")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="poke_pos must be finite"):
            predictor.sample(scene, [[np.nan, 0]], np.zeros((1, 2)), np.empty((0, 2)))
        with pytest.raises(ValueError, match=r"at least one sample, received \(0, 3, 2\)"):
            next(predictor.sampling_steps(scene, *[np.empty((0, 2))] * 2, np.empty((0, 3, 2))))
        none = predictor.sample(scene, np.empty((0, 2)), np.empty((0, 2)), queries, num_samples=1)
        assert np.isfinite(none).all()

    def test_sampling_steps_equal_predictions_with_what_was_drawn(
        self, predictor: FlowPredictor, image: np.ndarray
    ) -> None:
        scene, rng = predictor.encode(image), np.random.default_rng(0)
        queries, drawn = rng.random((2, 4, 2)), rng.normal(0, 0.1, (2, 4, 2))
        steps = predictor.sampling_steps(scene, self.POS, self.FLOW, queries)
        mixture = next(steps)
        for i in range(4):
            for row in range(2):
                expected = predictor.predict(
                    scene,
                    np.concatenate([self.POS, queries[row, :i]]),
                    np.concatenate([self.FLOW, drawn[row, :i]]),
                    queries[row, i : i + 1],
                )
                assert_mixtures_close(mixture[row : row + 1], expected, 1e-5)
            if i < 3:
                mixture = steps.send(drawn[:, i])
        with pytest.raises(StopIteration):
            steps.send(drawn[:, 3])
        for bad, message in (
            (drawn[:1, 0], "drawn must hold 2 motions, received 1"),
            (drawn[:, 0, :1], r"drawn must have shape \[N, 2\], received \[2, 1\]"),
            (drawn[:, 0] * np.nan, "drawn must be finite"),
        ):
            steps = predictor.sampling_steps(scene, self.POS, self.FLOW, queries)
            next(steps)
            with pytest.raises(ValueError, match=message):
                steps.send(bad)

    def test_any_truth_says_that_the_camera_is_static(
        self, predictor: FlowPredictor, image: np.ndarray
    ) -> None:
        scene, queries = predictor.encode(image), geometry.grid((2, 3))
        expected = predictor.predict(scene, self.POS, self.FLOW, queries)
        for flag in (2, np.array(1), np.True_):
            found = predictor.predict(scene, self.POS, self.FLOW, queries, flag)
            assert_mixtures_close(found, expected, 1e-6)

    @pytest.mark.parametrize("order", ["random", "given"])
    def test_joint_samples_are_given_what_was_drawn_before(
        self,
        predictor: FlowPredictor,
        image: np.ndarray,
        monkeypatch: pytest.MonkeyPatch,
        order: Order,
    ) -> None:
        """Each motion is drawn for its own query, with those of the queries before it known."""
        monkeypatch.setattr(FlowMixture, "sample", lambda mixture, n, rng: mixture.mean()[None])
        asked: list[np.ndarray] = []
        steps = FlowPredictor.sampling_steps

        def noted(self: FlowPredictor, *arguments: Any) -> Any:
            asked.append(arguments[3])
            return steps(self, *arguments)

        monkeypatch.setattr(FlowPredictor, "sampling_steps", noted)
        scene, queries = predictor.encode(image), np.random.default_rng(0).random((6, 2))
        args = (scene, self.POS, self.FLOW, queries)
        drawn = predictor.sample(*args, num_samples=3, seed=5, order=order)
        turns = [[queries.tolist().index(q) for q in row] for row in asked[0].tolist()]
        assert all(sorted(turn) == list(range(6)) for turn in turns)
        if order == "given":
            assert turns == [list(range(6))] * 3
        else:
            assert turns[0] != turns[1] != turns[2]
        for motions, turn in zip(drawn, turns, strict=True):
            for i, query in enumerate(turn):
                known = turn[:i]
                mixture = predictor.predict(
                    scene,
                    np.concatenate([self.POS, queries[known]]),
                    np.concatenate([self.FLOW, motions[known]]),
                    queries[[query]],
                )
                assert_close(motions[query], mixture.mean()[0], 1e-5)

    def test_coarse_to_fine(self, predictor: FlowPredictor, image: np.ndarray) -> None:
        scene = predictor.encode(image)
        futures = predictor.sample_dense(scene, self.POS, self.FLOW, (6, 5), (2, 2), num_samples=2)
        assert futures.shape == (2, 6, 5, 2)
        coarse = predictor.sample(scene, self.POS, self.FLOW, geometry.grid((2, 2)), num_samples=2)
        pokes = np.concatenate([self.POS, geometry.grid((2, 2))])
        fine = predictor.dense(scene, pokes, np.concatenate([self.FLOW, coarse[1]]), (6, 5))
        assert_close(futures[1], fine, 1e-5)

    def test_dense_products_agree(self, predictor: FlowPredictor, image: np.ndarray) -> None:
        scene = predictor.encode(image)
        mix = predictor.predict(scene, self.POS, self.FLOW, geometry.grid((6, 8)))
        flow = predictor.dense(scene, self.POS, self.FLOW, size=(6, 8))
        assert flow.shape == (6, 8, 2)
        assert flow.dtype == np.float32
        assert_close(flow.reshape(-1, 2), mix.mean(), 1e-6)
        mode = predictor.dense(scene, self.POS, self.FLOW, size=(6, 8), reduce="mode")
        assert_close(mode.reshape(-1, 2), mix.mode(), 1e-6)
        draws = [
            predictor.dense(scene, self.POS, self.FLOW, (6, 8), reduce="sample", seed=s)
            for s in (1, 1, 2)
        ]
        assert np.array_equal(draws[0], draws[1])
        assert not np.array_equal(draws[0], draws[2])
        kl = predictor.influence(scene, self.POS, self.FLOW, size=(6, 8))
        free = predictor.predict(scene, np.empty((0, 2)), np.empty((0, 2)), geometry.grid((6, 8)))
        assert_close(kl.ravel(), mix.kl(free), 1e-5)
        other = predictor.influence(scene, self.POS, self.FLOW, (6, 8), camera_static=False)
        fresh = predictor.encode(image)
        expected = predictor.influence(fresh, self.POS, self.FLOW, (6, 8), camera_static=False)
        assert_close(other, expected, 1e-5)
        assert np.abs(other - kl).max() > 1e-3, "each flag has its own answer without pokes"
        with pytest.raises(ValueError, match=r"\[48\] on a grid of \(6, 8\), received \[1\]"):
            predictor.influence_of(scene, mix[:1], (6, 8))
        with pytest.raises(ValueError, match="read-only"):
            predictor.unconditional(scene, (6, 8)).means[:] = 0  # of whoever asks next, too
        threshold = float(np.median(kl))
        mask = predictor.moving_part(scene, self.POS, self.FLOW, (6, 8), threshold)
        assert np.array_equal(mask, kl > threshold)

    def test_units_follow_the_image(self, model: FlowPokeTransformer) -> None:
        """In normalised units stretching is invisible and a crop's x is half of the image's."""
        square, wide = (np.full((32, w, 3), 90, np.uint8) for w in (32, 64))
        stretching = FlowPredictor(model)
        queries = geometry.grid((3, 3))
        expected = stretching.predict(stretching.encode(square), self.POS, self.FLOW, queries)
        stretched = stretching.predict(stretching.encode(wide), self.POS, self.FLOW, queries)
        assert_mixtures_close(stretched, expected)

        cropping_model = FlowPokeTransformer(dataclasses.replace(model.config, fit="crop")).eval()
        cropping_model.load_state_dict(model.state_dict())
        cropping = FlowPredictor(cropping_model)
        half, left = np.array([0.5, 1.0]), np.array([0.25, 0.0])
        cropped = cropping.predict(
            cropping.encode(wide), left + half * self.POS, half * self.FLOW, left + half * queries
        )
        assert_mixtures_close(cropped, expected.scaled(*half))

    @needs_compiler
    def test_compiled_layers_change_nothing(
        self, predictor: FlowPredictor, model: FlowPokeTransformer, image: np.ndarray
    ) -> None:
        compiled = FlowPredictor(model, compile=True)
        scene, other = predictor.encode(image), compiled.encode(image)
        queries = np.random.default_rng(0).random((50, 2))
        for count in (0, 2):
            pos, flow = (
                np.reshape(self.POS, (-1, 2))[:count],
                np.reshape(self.FLOW, (-1, 2))[:count],
            )
            expected = predictor.predict(scene, pos, flow, queries)
            assert_mixtures_close(compiled.predict(other, pos, flow, queries), expected, 1e-5)
        both = [self.POS, self.POS[::-1]], [self.FLOW, self.FLOW[::-1]], queries
        expected = predictor.predict_batch(scene, *both)
        assert_mixtures_close(compiled.predict_batch(other, *both), expected, 1e-5)
        assert all("forward" in vars(layer) for layer in compiled.engine.model.layers)
        assert not any("forward" in vars(layer) for layer in predictor.engine.model.layers)

    def test_bf16_is_close(self, model: FlowPokeTransformer, image: np.ndarray) -> None:
        queries = geometry.grid((4, 4))
        exact, rough = (
            p.predict(p.encode(image), self.POS, self.FLOW, queries)
            for p in (FlowPredictor(model), FlowPredictor(model, precision="bf16"))
        )
        assert_close(rough.means, exact.means, 0.05 * np.abs(exact.means).max())

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_loading_from_a_file_changes_nothing(
        self, model: FlowPokeTransformer, image: np.ndarray, tmp_path: Path, precision: Precision
    ) -> None:
        save_model(model, tmp_path / "m.safetensors")
        loaded = FlowPredictor.load(tmp_path / "m.safetensors", precision=precision)
        made, found = (
            p.predict(p.encode(image), self.POS, self.FLOW, geometry.grid((4, 4)))
            for p in (FlowPredictor(model, precision=precision), loaded)
        )
        np.testing.assert_array_equal(found.means, made.means)
        np.testing.assert_array_equal(found.scale_tril, made.scale_tril)

    def test_convolutions_do_what_batch_norms_did(self, model: FlowPokeTransformer) -> None:
        with torch.no_grad():
            x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
            expected = model.encoder(x)
            random_state = torch.get_rng_state()
            own = TorchEngine(model, "cpu", "fp32").model.encoder
            assert torch.equal(torch.get_rng_state(), random_state)
            for found, map_ in zip(own(x), expected, strict=True):
                assert_close(found, map_, 1e-5 * max(1.0, float(map_.abs().max())))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in own.modules())
        assert model.encoder.convolutional == any(
            isinstance(m, nn.BatchNorm2d) for m in model.encoder.modules()
        )

    def test_a_batch_norm_that_comes_first_stays(self) -> None:
        """Made after the convolution, run before it."""

        class Before(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
                nn.init.uniform_(self.norm.running_mean)

            def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
                return [self.conv(self.norm(x))]

        before, x = Before().eval(), torch.rand(1, 3, 8, 8)
        assert fold_batch_norms(before, x) is before
        assert isinstance(before.norm, nn.BatchNorm2d)

    def test_conversion_in_place(
        self, model: FlowPokeTransformer, image: np.ndarray, tmp_path: Path
    ) -> None:
        trained = copy.deepcopy(model).train()
        made, found = (
            p.predict(p.encode(image), self.POS, self.FLOW, geometry.grid((4, 4)))
            for p in (FlowPredictor(model), FlowPredictor(trained, in_place=True))
        )
        np.testing.assert_array_equal(found.means, made.means)
        for use in (FlowPredictor, lambda m: save_model(m, tmp_path / "m.safetensors")):
            with pytest.raises(ValueError, match="converted in place"):
                use(trained)
        assert not list(tmp_path.iterdir())

    def test_preparing_in_place_keeps_one_copy(self, model: FlowPokeTransformer) -> None:
        own = copy.deepcopy(model)
        before = [weakref.ref(p) for p in own.layers.parameters()]
        prepare(own, torch.device("cpu"), torch.bfloat16, in_place=True)
        assert sum(r() is not None for r in before) < len(before) / 4

    @pytest.mark.parametrize(
        ("pos", "flow", "message"),
        [
            ([0.5, 0.5], [0.1, 0.1], r"poke_pos must have shape \[N, 2\], received \[2\]"),
            ([[0.5, np.nan]], [[0.1, 0.1]], r"poke_pos must be finite.*, received \[0.5, nan\]"),
            ([[0.5, 1e39]], [[0.1, 0.1]], r"poke_pos must be finite, at most 1e\+06, .* 1e\+39\]"),
            ([[3e38, 0.5]], [[0.1, 0.1]], r"poke_pos must be finite, at most .*3e\+38"),
            ([[0.5, 0.5]], [[0.1, np.inf]], r"poke_flow must be finite.*at \[0\]"),
            ([[0.5, 0.5]], [[0.1, 0.1, 0.0]], r"poke_flow must have shape \[N, 2\]"),
            ([[0.5, 0.5]], np.zeros((2, 2)), "the same pokes"),
            ([[0.5, 0.5], [0.1]], np.zeros((2, 2)), "poke_pos must be an array of numbers"),
            ([[0.5, 0.5]], "left", "poke_flow must be an array of numbers, received 'left'"),
        ],
    )
    def test_bad_pokes(
        self, predictor: FlowPredictor, image: np.ndarray, pos: object, flow: object, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            predictor.predict(predictor.encode(image), pos, flow, [[0.5, 0.5]])

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (np.zeros((4, 4, 3), np.float32), "received float32"),
            (np.zeros((4, 4), np.uint8), r"received \[4, 4\]"),
            (np.zeros((0, 4, 3), np.uint8), r"received \[0, 4, 3\]"),
            ("cup.png", "received str"),
        ],
    )
    def test_bad_images(self, predictor: FlowPredictor, bad: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            predictor.encode(bad)  # type: ignore[arg-type]


def test_packed_products_are_there_where_onednn_has_bfloat16() -> None:
    """What could not be packed would go unnoticed: slower, and its tests skipped."""
    assert can_pack() == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not can_pack(), reason="no packed products of bfloat16 here")
class TestPacked:
    """Of the sizes of fpt-base, whose weights are large enough to be packed."""

    # one, some, and so many rows that the product is computed in parts, with a part left over
    @pytest.mark.parametrize("shape", [(768,), (1, 2, 768), (2, 515, 768)])
    @torch.inference_mode()
    def test_products(self, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(768, 768, dtype=torch.bfloat16)
        x = torch.randn(shape, dtype=torch.bfloat16)
        found, exact = PackedLinear(linear)(x), F.linear(x.float(), linear.weight.float())
        assert found.shape == x.shape
        assert_close(found.float(), exact + linear.bias.float(), 0.02)

    @torch.inference_mode()
    def test_a_stack_is_replaced_and_keeps_its_outputs(self) -> None:
        torch.manual_seed(0)
        stack = nn.Sequential(QKV(768), nn.SiLU(), nn.Linear(2304, 256), nn.Linear(256, 2))
        stack.to(torch.bfloat16)
        x = torch.randn(3, 768, dtype=torch.bfloat16)
        expected, values = stack(x), stack[0].values(x)
        pack(stack)
        assert [type(m) for m in stack] == [PackedQKV, nn.SiLU, PackedLinear, nn.Linear]
        assert not list(stack[0].parameters())
        assert_close(stack(x).float(), expected.float(), 0.02)
        assert_close(stack[0].values(x).float(), values.float(), 0.02)

    def test_weights_go_with_their_layers(self) -> None:
        before = len(packed._packed)
        layer = PackedLinear(nn.Linear(8, 8, dtype=torch.bfloat16))
        assert len(packed._packed) == before + 1
        other = copy.deepcopy(layer)
        del layer
        assert other(torch.zeros(1, 8, dtype=torch.bfloat16)).shape == (1, 8)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(other)
        del other
        assert len(packed._packed) == before

    @pytest.mark.skipif(sys.platform != "linux", reason="asks glibc and /proc")
    def test_no_holes_are_left_where_weights_were(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", PACKED], capture_output=True, text=True, check=True
        )
        assert float(done.stdout) < 8  # MiB; 19 if they are


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
class TestOneDNN:
    """Products of float32, which on processors that are not Intel's MKL is slow at."""

    # a few rows, which are left to MKL; many; and a view as the image's maps are
    @pytest.mark.parametrize("rows", [1, 700])
    @pytest.mark.parametrize("bias", [False, True])
    @torch.inference_mode()
    def test_products(self, rows: int, bias: bool) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(192, 576, bias=bias)
        own = OneDNNLinear(linear)
        assert own.weight is linear.weight
        x = torch.randn(2, 192, rows)
        for given in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
            exact = given.double() @ linear.weight.double().T
            exact += linear.bias.double() if bias else 0
            assert_close(own(given).double(), exact, 2e-6)

    def test_a_stack_is_replaced_and_keeps_its_outputs(self) -> None:
        torch.manual_seed(0)
        stack = nn.Sequential(QKV(192), nn.SiLU(), nn.Linear(576, 256).double())
        x = torch.randn(400, 192)
        with torch.inference_mode():
            expected, values = stack[0](x), stack[0].values(x)
            multiply_by_onednn(stack)
            assert [type(m) for m in stack] == [OneDNNQKV, nn.SiLU, nn.Linear]
            assert_close(stack[0](x), expected, 2e-6)
            assert_close(stack[0].values(x), values, 2e-6)
        weight = stack[0].weight.detach()
        torch.library.opcheck(torch.ops.fpt_model.linear.default, (x, weight, None))

    @pytest.mark.parametrize("slow", [False, True])
    def test_engines_multiply_so_where_it_is_faster(
        self, model: FlowPokeTransformer, slow: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fpt_model.engine.mkl_is_slow", lambda: slow)
        for precision, layers in (("fp32", True), ("bf16", False)):  # whose head is in float32
            engine = FlowPredictor(model, precision=precision).engine
            kinds = [type(engine.model.layers[0].cross_q), type(engine.model.head[1])]
            expected = [OneDNNLinear if slow and own else nn.Linear for own in (layers, 1)]
            assert kinds == expected


PACKED = """
import torch
from torch import nn
from fpt_model.allocator import blocks_apart
from fpt_model.packed import pack

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def layer():  # as in fpt-base, 13 MiB
    sizes = (768, 2304), (768, 768), (768, 3072), (3072, 768)
    return nn.Sequential(*(nn.Linear(*size) for size in sizes)).bfloat16()

torch.set_num_threads(1)
pack(layer())  # loads what is loaded once
with blocks_apart():  # as FlowPredictor.load
    model = nn.Sequential(*(layer() for _ in range(8)))
    before = resident()
    pack(model)
print(resident() - before)
"""


class Hostile:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


class Command:
    """Of a module that torch names in another message."""

    def __reduce__(self) -> tuple:
        return os.system, ("true",)


class TestCheckpoint:
    def test_round_trip(self, model: FlowPokeTransformer, tmp_path: Path) -> None:
        save_model(model, tmp_path / "m.safetensors")
        loaded = load_model(tmp_path / "m.safetensors")
        assert loaded.config == model.config
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key

    def test_half_precision_storage_loads_as_float32(
        self, model: FlowPokeTransformer, tmp_path: Path
    ) -> None:
        save_model(model, tmp_path / "m.safetensors", dtype=torch.float16)
        loaded = load_model(tmp_path / "m.safetensors")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}

    def test_unknown_name_lists_the_shipped(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"'fpt-huge'.*shipped models"):
            load_model("fpt-huge")

    def test_damaged_files(self, model: FlowPokeTransformer, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        save_model(model, path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            load_model(path)
        (tmp_path / "m.pt").write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match=r"m\.pt"):
            load_model(tmp_path / "m.pt")
        torch.save({"weights": {}}, tmp_path / "n.pt")
        with pytest.raises(CheckpointError, match='"model"'):
            load_model(tmp_path / "n.pt")

    def test_wrong_tensor_is_named(self, model: FlowPokeTransformer, tmp_path: Path) -> None:

        from safetensors.torch import save_file

        metadata = {"fpt_config": json.dumps(model.config.to_dict())}
        state = dict(model.state_dict())
        path = tmp_path / "m.safetensors"
        for change, message in (
            ({"head.1.bias": torch.zeros(3)}, r"'head.1.bias' has shape \[3\], expected \[48\]"),
            ({"head.1.bias": torch.full((48,), torch.nan)}, "'head.1.bias' has values"),
            ({"surprise": torch.zeros(1)}, "unexpected tensor 'surprise'"),
        ):
            save_file({**state, **change}, path, metadata)
            with pytest.raises(CheckpointError, match=message):
                load_model(path)
        del state["layers.1.self_scale"]
        save_file(state, path, metadata)
        with pytest.raises(CheckpointError, match=r"'layers.1.self_scale' \[3\] is missing"):
            load_model(path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("[" * 200_000, "unusable configuration"),
            ({"encoder_kwargs": {"depth": 10**7}}, r"encoder_kwargs\.depth 10000000"),
            ({"encoder_kwargs": {"depth": "many"}}, "unusable configuration"),
            ({"encoder_kwargs": {"layers": {"a": 1}}}, "unusable configuration"),
            ({"encoder_kwargs": {"depths": [2**62] * 2}}, "has encoder_kwargs.depths 922337"),
            ({"encoder_kwargs": {"layers": [10**6] * 4}}, r"encoder_kwargs\.layers 4000000"),
            ({"encoder_kwargs": {"depth": 10**400}}, "unusable configuration"),
            ({"depth": 10**7}, r"depth must be an integer in \[1, 65536\], received 10000000"),
            ({"depth": 10**4}, "has depth 10000, but only"),
            ({"width": 10**9}, r"width must be an integer in \[1, 65536\], received 1000000000"),
        ],
        ids=[
            "nested",
            "deep encoder",
            "no number",
            "a table",
            "too large",
            "deep stages",
            "beyond floats",
            "very deep",
            "deep",
            "wide",
        ],
    )
    def test_a_configuration_cannot_take_all_time_and_memory(
        self, model: FlowPokeTransformer, tmp_path: Path, config: str | dict[str, Any], message: str
    ) -> None:
        from safetensors.torch import save_file

        if isinstance(config, dict):
            config = json.dumps(model.config.to_dict() | config)
        path = tmp_path / "m.safetensors"
        save_file(dict(model.state_dict()), path, {"fpt_config": config})
        with pytest.raises(CheckpointError, match=message):
            load_model(path)

    def test_whatever_else_makes_parameters_without_end(self) -> None:
        with (
            pytest.raises(ValueError, match="it would have more than 7 parameters"),
            checkpoint._parameters_without_memory(7),
        ):
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**9)))

    def test_unreadable_tensors_are_named(self, model: FlowPokeTransformer) -> None:
        for change, message in (
            (torch.zeros(48, dtype=torch.float8_e4m3fn), r"is torch\.float8_e4m3fn"),
            (torch.zeros(48, dtype=torch.complex64), r"is torch\.complex64"),
            (torch.zeros(48, dtype=torch.int64), r"is torch\.int64"),
            (torch.zeros(48).to_sparse(), r"torch\.sparse_coo"),
            (torch.zeros(48, device="meta"), "on meta"),
        ):
            made = {k: partial(torch.as_tensor, v) for k, v in model.state_dict().items()}
            made["head.1.bias"] = partial(torch.as_tensor, change)
            with pytest.raises(CheckpointError, match=rf"^m: tensor 'head.1.bias'.*{message}"):
                checkpoint._build(model.config, made, "m")

    @pytest.mark.parametrize("change", ["replaced", "removed", "damaged"])
    def test_a_file_that_changes_while_it_is_read(
        self,
        model: FlowPokeTransformer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        change: str,
    ) -> None:
        path, isfinite, seen = tmp_path / "m.safetensors", torch.isfinite, []
        save_model(model, path)

        def interfere(value: torch.Tensor) -> torch.Tensor:
            seen.append(value)
            if len(seen) == 10:
                if change == "replaced":
                    save_model(model, path)
                elif change == "removed":
                    path.unlink()
                else:
                    (tmp_path / "new").write_bytes(b"nothing")
                    (tmp_path / "new").replace(path)
            return isfinite(value)

        monkeypatch.setattr(checkpoint._MappedFile, "_LIMIT", 0)  # opened for every tensor
        monkeypatch.setattr(torch, "isfinite", interfere)
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            load_model(path)

    def test_archives(self, tmp_path: Path) -> None:
        """torch's today and of old; those with compressed parts, and with damaged ones, fail."""
        state = {"model": {"out_mlp.1.bias": torch.ones(800)}}
        plain, legacy, deflated, flipped = (
            tmp_path / f"{name}.pt" for name in ("plain", "legacy", "deflated", "flipped")
        )
        torch.save(state, plain)
        torch.save(state, legacy, _use_new_zipfile_serialization=False)
        with (
            zipfile.ZipFile(plain) as good,
            zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as bad,
        ):
            for part in good.namelist():
                bad.writestr(part, good.read(part))
        one = np.float32(1).tobytes()
        content = plain.read_bytes().replace(800 * one, 799 * one + b"flip")
        assert content != plain.read_bytes()
        flipped.write_bytes(content)
        assert checkpoint._is_archive(plain)
        assert not checkpoint._is_archive(legacy)
        for path, message in (
            (plain, r"'.*' \[.*\] is missing"),
            (legacy, r"'.*' \[.*\] is missing"),
            (deflated, "part 'plain/.*' is compressed"),
            (flipped, "damaged: the checksum of its part 'plain/data/0' is another"),
        ):
            with pytest.raises(CheckpointError, match=rf"{path.name}.*{message}"):
                load_model(path)

    def test_a_prefix_of_all_names_shows(self, model: FlowPokeTransformer) -> None:
        """As of a model that was wrapped when it was saved."""
        made = {f"module.{k}": v.clone for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"is missing, but 'module\..*' is there"):
            checkpoint._build(model.config, made, "m")

    def test_what_a_type_cannot_hold_is_not_saved(
        self, model: FlowPokeTransformer, tmp_path: Path
    ) -> None:
        large = copy.deepcopy(model)
        with torch.no_grad():
            large.head[1].bias[3] = 1e5
        with pytest.raises(ValueError, match=r"'head.1.bias' has values that are not finite in to"):
            save_model(large, tmp_path / "m.safetensors", torch.float16)
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_takes_no_file(self, model: FlowPokeTransformer) -> None:
        with pytest.raises(OSError, match=r"m\.safetensors cannot be written"):
            save_model(model, "/proc/m.safetensors")

    def test_pickled_code_does_not_run(self, tmp_path: Path) -> None:
        trace = tmp_path / "ran"
        torch.save({"model": Hostile(trace)}, tmp_path / "evil.pt")
        (tmp_path / "raw.pt").write_bytes(pickle.dumps(Hostile(trace)))
        torch.save({"model": Command()}, tmp_path / "command.pt")
        (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html>")
        for name, reason in (
            ("evil.pt", "Unsupported global: GLOBAL getattr was not an allowed"),
            ("raw.pt", ""),
            ("command.pt", "Trying to load unsupported GLOBAL .*system"),
            ("page.pt", "Unsupported operand 60"),
        ):
            with pytest.raises(
                CheckpointError,
                match=rf"{name} is not a readable weights-only checkpoint: {reason}",
            ) as refused:
                load_model(tmp_path / name)
            message = str(refused.value)
            assert not message.endswith(": ")
            assert not any(advice in message for advice in ("weights_only", "add_safe", "\n"))
        assert not trace.exists()
