# SPDX-License-Identifier: MIT
"""Parity with the public implementation (CompVis/flow-poke-transformer, commit 104f9c3).

Most compare with tensors it computed, which are not part of the repository: set FPT_REFERENCE_DIR.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from compilers import needs_compiler
from reference_weights import inputs, state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from fpt_model import (
    CheckpointError,
    FlowMixture,
    FlowPokeTransformer,
    FlowPredictor,
    FPTConfig,
)
from fpt_model.backends import Precision
from fpt_model.config import FPT_BASE
from fpt_model.encoder import preprocess, resize_square
from fpt_model.engine import EncodedImage
from fpt_model.geometry import ModelView
from fpt_model.layers import grid_positions
from fpt_model.model import mixture_parameters, negative_log_likelihood
from fpt_model.predictor import Scene
from training.evaluation.measure import variational_kl

REFERENCE = Path(
    os.environ.get("FPT_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "reference")
)
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"FPT_REFERENCE_DIR: no reference tensors in {REFERENCE}"
)

SMALL_SEED = 77
SMALL = FPTConfig(
    encoder="vit_base_patch14_reg4_dinov2",
    encoder_kwargs={"embed_dim": 64, "depth": 2, "num_heads": 2},
    image_size=112,
    width=96,
    depth=2,
    head_dim=32,
    sample_align_corners=True,
    head="reference",
)
OWN = Path(__file__).parent / "fixtures"
COMPILE = [False, pytest.param(True, marks=needs_compiler)]  # with C++ of our own

Arrays = dict[str, np.ndarray]


def assert_mixture(mixture: FlowMixture, z: Arrays, name: str, tolerance: float) -> None:
    for own, theirs in (
        (mixture.log_weights, "log_weights"),
        (mixture.means, "loc"),
        (mixture.scale_tril, "scale_tril"),
    ):
        assert_close(own, z[f"{name}{theirs}"], tolerance)


def mixture_of(raw: Tensor, config: FPTConfig) -> FlowMixture:
    return FlowMixture(*(x.numpy() for x in mixture_parameters(raw, config)))


def outputs_of(modules: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """What each module returns while ``run`` is called; of a tuple the first."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_own_fixture() -> None:
    """The core of the parity everywhere: outputs that were once compared with the reference's.

    Weights and inputs come from their formulas, only shapes and outputs are stored.
    """
    shapes = json.loads((OWN / "parity_shapes.json").read_text())
    z = dict(np.load(OWN / "parity_outputs.npz"))
    model = FlowPokeTransformer.from_reference(state_dict(SMALL_SEED, shapes), SMALL)
    t = inputs(SMALL_SEED, 112, batch=2, pokes=5, queries=12)
    static = torch.tensor([True, False])
    with torch.no_grad():
        features = model.encode(t["image"])
        raw = model.forward_raw(features, t["poke_pos"], t["poke_flow"], t["query_pos"], static)
    assert_close(features.maps[0][:, ::8], z["features"], 1e-5)
    assert_close(raw, z["raw"], 1e-5)


def test_a_model_shares_no_memory_with_the_state_dict_and_is_on_the_cpu() -> None:
    weights = state_dict(SMALL_SEED, json.loads((OWN / "parity_shapes.json").read_text()))
    before = {name: tensor.clone() for name, tensor in weights.items()}
    random_state = torch.get_rng_state()
    model = FlowPokeTransformer.from_reference(weights, SMALL)
    assert torch.equal(torch.get_rng_state(), random_state), "weights were drawn to be replaced"
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    made = FlowPokeTransformer(SMALL)  # as ever afterwards
    assert {p.device.type for p in made.parameters()} == {"cpu"}


ENDLESS = torch.zeros(1, 1, 1).expand(1, 1 + 10**12, 64)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("transformer.layers.1.self_scale", None, r"layers.1.self_scale' \[3\] is missing"),
        ("input_mlp.mlp.2.1.weight", torch.zeros(2), "'input_mlp.mlp.2.1.weight' has shape"),
        ("image_embedder.model.pos_embed", torch.zeros(1, 12, 64), r"\[1, 12, 64\], expected"),
        ("image_embedder.model.pos_embed", torch.zeros(0), r"pos_embed' has shape \[0\], expected"),
        ("image_embedder.model.pos_embed", torch.zeros(3, 65, 64), r"\[3, 65, 64\], expected \[1,"),
        (
            "image_embedder.model.pos_embed",
            torch.full((1, 65, 64), torch.nan),
            "pos_embed' has val",
        ),
        (
            "image_embedder.model.pos_embed",
            torch.ones(1, 65, 64).bool(),
            "pos_embed' is torch.bool",
        ),
        (
            "image_embedder.model.pos_embed",
            ENDLESS,
            r"pos_embed' is .* each of them stored",
        ),
        (
            "image_embedder.model.cls_token",
            torch.zeros(1, 1, 64).to_sparse(),
            "cls_token' is .*sparse",
        ),
        ("input_mlp.query_token", torch.zeros(2, 96, 1), r"query_token' has shape \[2, 96, 1\]"),
        ("image_embedder.model.register_tokens", torch.zeros(1), "model.register_tokens' has"),
        ("cond_emb.weight", "weights", "'cond_emb.weight' is no tensor"),
        ("out_mlp.1.bias", torch.full((96,), torch.inf), "'out_mlp.1.bias' has values that"),
        (
            "out_mlp.1.bias",
            torch.full((96,), 1e300, dtype=torch.float64),
            "'out_mlp.1.bias' has val",
        ),
        ("optimizer.step", torch.zeros(()), r"unexpected tensor 'optimizer.step' \[\]"),
        ("head.5.bias", torch.zeros(24), "unexpected tensor 'head.5.bias'"),  # ours has that name
        (
            "image_embedder.mask_token",
            torch.zeros(1),
            "unexpected tensor 'image_embedder.mask_token'",
        ),
        ("input_mlp.coeffs", torch.zeros(1, 1, 1, 48), r"coeffs' \[1, 1, 1, 48\] differs from"),
        ("transformer.pos_emb.freqs", torch.ones(2, 3, 8), r"freqs' \[2, 3, 8\] differs from"),
    ],
)
def test_the_first_wrong_tensor_is_named_as_in_the_file(
    key: str, value: object, message: str
) -> None:
    weights: dict = state_dict(SMALL_SEED, json.loads((OWN / "parity_shapes.json").read_text()))
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    with pytest.raises(CheckpointError, match=message):
        FlowPokeTransformer.from_reference(weights, SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_constants_are_those_of_our_formulas(dtype: torch.dtype) -> None:
    """As they are stored: with axes along which nothing changes, and rounded."""
    weights = state_dict(SMALL_SEED, json.loads((OWN / "parity_shapes.json").read_text()))
    frequencies = math.pi * 10 ** (torch.arange(24) / 24)  # SPEC 4.2: slot j, head h is j * 3 + h
    weights["transformer.pos_emb.freqs"] = frequencies.view(8, 3).T.repeat(2, 1, 1).to(dtype)
    weights["input_mlp.coeffs"] = (2 * math.pi * torch.arange(1, 49)).view(1, 1, 1, 48).to(dtype)
    FlowPokeTransformer.from_reference(weights, SMALL)


def test_the_references_configuration_lacks_something() -> None:
    with pytest.raises(ValueError, match="lacks 'dino', received"):
        FPTConfig.from_reference({"width": 96})
    with pytest.raises(ValueError, match=r"a table with a table 'dino', received \{'dino': None"):
        FPTConfig.from_reference({"dino": None})


@needs_reference
class TestSmall:
    @pytest.fixture(scope="class")
    def z(self) -> Arrays:
        return dict(np.load(REFERENCE / "small_io.npz"))

    @pytest.fixture(scope="class")
    def t(self, z: Arrays) -> dict[str, Tensor]:
        names = ("image", "poke_pos", "poke_flow", "query_pos", "camera_static")
        return {name: torch.from_numpy(z[name]) for name in names}

    @pytest.fixture(scope="class")
    def model(self) -> FlowPokeTransformer:
        config = json.loads((REFERENCE / "small_config.json").read_text())
        weights = load_file(REFERENCE / "small_state_dict.safetensors")
        return FlowPokeTransformer.from_reference(weights, config)

    @pytest.fixture(scope="class", params=COMPILE)
    def predictor(
        self, model: FlowPokeTransformer, request: pytest.FixtureRequest, build_cache: Path
    ) -> FlowPredictor:
        return FlowPredictor(model, compile=request.param)

    def scene(self, predictor: FlowPredictor, image: Tensor) -> Scene:
        """Of the model's own input, since the reference's image is not one of 8 bits."""
        with torch.inference_mode():
            features = EncodedImage(predictor.engine.model.encode(image))
            return Scene(ModelView(112, 112, "crop"), features, predictor.engine)

    def test_seeded_weights_and_inputs(self, t: dict[str, Tensor]) -> None:
        stored = load_file(REFERENCE / "small_state_dict.safetensors")
        seeded = state_dict(SMALL_SEED, {key: value.shape for key, value in stored.items()})
        for key, value in seeded.items():
            assert torch.equal(value, stored[key]), key
        for name, value in inputs(SMALL_SEED, 112, 2, 5, 12).items():
            assert torch.equal(value, t[name]), name

    def test_image_encoder(
        self, model: FlowPokeTransformer, z: Arrays, t: dict[str, Tensor]
    ) -> None:
        vit = model.encoder.backbone
        found = outputs_of(
            {"patch_embed": vit.patch_embed, "norm": vit.norm}
            | {f"block{i}": block for i, block in enumerate(vit.blocks)},
            lambda: model.encode(t["image"]),
        )
        for name, value in found.items():
            assert_close(value, z[f"dino.{name}"], 1e-5)
        table = torch.cat([vit.cls_token * 0, vit.pos_embed], 1)[:, 1:].detach()
        assert_close(table, z["dino.pos_embed_interp"][:, 1:], 1e-5)
        assert_close(found["norm"][:, 5:].transpose(1, 2).unflatten(2, (8, 8)), z["feat"], 1e-5)
        positions = grid_positions(8, 8, torch.device("cpu")).view(8, 8, 2)
        assert_close(positions.expand(2, -1, -1, -1), z["feat_pos"], 1e-6)

    def test_images_of_any_shape(self, model: FlowPokeTransformer, z: Arrays) -> None:
        x = preprocess(z["nonsquare_u8_hwc"], model.config)
        assert_close(x, z["nonsquare_resized_m1p1"], 1e-5)
        with torch.no_grad():
            assert_close(model.encode(x).maps[0], z["nonsquare_feat"], 1e-5)
        assert resize_square(x, 112) is x

    def test_tokens_layers_and_head(
        self, model: FlowPokeTransformer, z: Arrays, t: dict[str, Tensor]
    ) -> None:
        points = torch.cat([t["poke_pos"], t["query_pos"]], 1)
        for pos, name in (
            (points, "theta_query"),
            (torch.from_numpy(z["feat_pos"]).flatten(1, 2), "theta_image"),
        ):
            for own, function in zip(model.rope(pos), (np.cos, np.sin), strict=True):
                assert_close(own, function(z[name]), 1e-5)

        modules: dict[str, nn.Module] = {
            "input_mlp.linear0": model.embed.project,
            "input_tokens": model.embed,
        }
        for i, layer in enumerate(model.layers):
            modules |= {
                f"layer{i}.self_norm": layer.self_norm,
                f"layer{i}.self_branch": layer.self_out,
                f"layer{i}.cross_norm": layer.cross_norm,
                f"layer{i}.ffn_branch": layer.ffn_down,
                f"layer{i}.out": layer,
            }
        features = model.encode(t["image"])
        args = (t["poke_pos"], t["poke_flow"], t["query_pos"], t["camera_static"])
        found = outputs_of(modules, lambda: model.run(features, None, *args))
        for name, value in found.items():
            # the residual stream reaches 10, and is 3e-5 off float64 in both implementations
            assert_close(value, z[name], 1.5e-5 if name == "layer1.out" else 1e-5)
        with torch.no_grad():
            raw = model.head(found["layer1.out"])
        assert_close(raw, z["out_raw24"], 1e-5)
        mixture = mixture_of(raw, model.config)
        assert_mixture(mixture, z, "parallel.", 1e-5)
        assert_mixture(mixture, z, "parallel_f64.", 1e-5)
        assert_close(mixture.weights, z["parallel.weights"], 1e-5)
        assert_close(mixture.mean(), z["parallel.mean"], 1e-5)
        assert_close(mixture.std() ** 2, z["parallel.variance_diag"], 1e-5)
        assert_close(mixture.log_prob(z["eval_points"]), z["parallel.log_prob"], 1e-5)

    def test_predictions(self, predictor: FlowPredictor, z: Arrays, t: dict[str, Tensor]) -> None:
        """Through the predictor and what it folds and caches."""
        order = z["poke_perm"]
        for row in range(2):
            scene = self.scene(predictor, t["image"][row : row + 1])
            pos, flow, queries = (z[name][row] for name in ("poke_pos", "poke_flow", "query_pos"))
            static = bool(z["camera_static"][row])
            for name, answer in (
                ("nopoke.", predictor.predict(scene, pos[:0], flow[:0], queries, static)),
                ("single_query4.", predictor.predict(scene, pos, flow, queries[4:5], static)),
                (
                    "permuted_pokes.",
                    predictor.predict(scene, pos[order], flow[order], queries, static),
                ),
            ):
                expected = {key: value[row] for key, value in z.items() if key.startswith(name)}
                assert_mixture(answer, expected, name, 1e-5)

    def test_autoregression_by_teacher_forcing(
        self, predictor: FlowPredictor, z: Arrays, t: dict[str, Tensor]
    ) -> None:
        """Given the motions the reference drew, each step has the distribution it drew from."""
        for row in range(2):
            scene = self.scene(predictor, t["image"][row : row + 1])
            steps = predictor.sampling_steps(
                scene,
                z["poke_pos"][row],
                z["poke_flow"][row],
                z["query_pos"][row : row + 1],
                bool(z["camera_static"][row]),
            )
            mixture = next(steps)
            for i, flow in enumerate(z["ar.flows_sampled"][row]):
                expected = {
                    key: value[row, i : i + 1]
                    for key, value in z.items()
                    if key.startswith("ar.step_")
                }
                assert_mixture(mixture, expected, "ar.step_", 1e-5)
                if i < 11:
                    mixture = steps.send(flow[None])

    def test_training(self, model: FlowPokeTransformer, z: Arrays, t: dict[str, Tensor]) -> None:
        queries, target = (torch.from_numpy(z[f"train.{name}"]) for name in ("query_pos", "target"))
        with torch.no_grad():
            raw = model(
                model.encode(t["image"]),
                *(t[name] for name in ("poke_pos", "poke_flow")),
                queries,
                t["camera_static"],
                torch.arange(queries.shape[1]),
            )
        assert_mixture(mixture_of(raw.flatten(1, 2), model.config), z, "train.", 1e-5)
        nll = negative_log_likelihood(raw, target, model.config)
        assert abs(nll.mean().item() - z["train.nll_mean"]) <= 1e-5

    def test_training_mask(
        self, model: FlowPokeTransformer, z: Arrays, t: dict[str, Tensor]
    ) -> None:
        """Query q changes with exactly the pokes that the reference's mask lets it see."""
        allowed = z["train.mask"]  # 5 pokes, then 5 groups of 3 queries
        queries = torch.from_numpy(z["train.query_pos"])[:1]
        args = (model.encode(t["image"][:1]), t["poke_pos"][:1], t["poke_flow"][:1])
        last = t["camera_static"][:1], torch.arange(queries.shape[1])

        def raw(poke_flow: Tensor) -> Tensor:
            with torch.no_grad():
                return model(*args[:2], poke_flow, queries, *last).flatten(1, 2)[0]

        before = raw(args[2])
        for poke in range(5):
            moved = args[2].clone()
            moved[0, poke] += 0.3
            changed = (raw(moved) - before).abs().amax(-1) > 1e-6
            assert changed.tolist() == allowed[5:, poke].tolist()

    def test_kl(self, z: Arrays) -> None:
        kl = np.load(REFERENCE / "small_kl.npz")
        poked, free = (
            FlowMixture(z[f"{name}.log_weights"], z[f"{name}.loc"], z[f"{name}.scale_tril"])
            for name in ("parallel", "nopoke")
        )
        poked = poked[:, 5:]  # the queries
        assert_close(poked.kl(free), kl["matched_bound"], 1e-9)
        assert_close(poked.component_kl(free), kl["kl_pairs"], 1e-9)
        assert_close(variational_kl(poked, free), kl["variational"], 1e-9)
        assert_close(poked.kl(free, "monte_carlo", samples=20_000), kl["numeric"], 0.02)

    def test_cumulative_distribution(self, z: Arrays) -> None:
        """Nothing here needs one, but theirs is one more view of the same mixture."""
        mixture = FlowMixture(
            *(z[f"parallel.{name}"][0, 5] for name in ("log_weights", "loc", "scale_tril"))
        )
        normal = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
        nodes, node_weights = np.polynomial.legendre.leggauss(200)
        found = []
        for x, y in z["cdf_points"]:
            total = 0.0
            for weight, mean, tril in zip(
                mixture.weights, mixture.means, mixture.scale_tril, strict=True
            ):
                high = min((x - mean[0]) / tril[0, 0], 9.0)  # of the first axis, standardised
                u = (high + 9) / 2 * (nodes + 1) - 9
                density = np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
                below = normal((y - mean[1] - tril[1, 0] * u) / tril[1, 1])
                total += weight * (high + 9) / 2 * np.sum(node_weights * density * below)
            found.append(total)
        assert_close(found, z["cdf_of_query0_batch0"], 1e-5)


@needs_reference
class TestBase:
    """The published architecture with seeded weights: 233 M parameters, about 3 GB."""

    @pytest.fixture(scope="class")
    def z(self) -> Arrays:
        return dict(np.load(REFERENCE / "base_io.npz"))

    @pytest.fixture(scope="class")
    def model(self, z: Arrays) -> FlowPokeTransformer:
        shapes = json.loads((REFERENCE / "state_dict_base.json").read_text())
        weights = state_dict(1234, {key: entry["shape"] for key, entry in shapes.items()})
        for key, first in z.items():
            if key.startswith("weights_first4::"):
                own = weights[key.removeprefix("weights_first4::")].flatten()[:4]
                assert np.array_equal(own.numpy(), first), key
        return FlowPokeTransformer.from_reference(weights, FPT_BASE)

    @pytest.mark.parametrize("compiled", COMPILE)
    @pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
    @pytest.mark.usefixtures("build_cache")
    def test_predictions(
        self,
        model: FlowPokeTransformer,
        z: Arrays,
        precision: Precision,
        tolerance: float,
        compiled: bool,
    ) -> None:
        predictor = FlowPredictor(model, precision=precision, compile=compiled)
        t = inputs(1234, 448, batch=1, pokes=5, queries=16)
        assert np.array_equal(t["image"].flatten()[:8].numpy(), z["image_first8"])
        with torch.inference_mode():
            features = predictor.engine.model.encode(t["image"])
            scene = Scene(ModelView(448, 448, "crop"), EncodedImage(features), predictor.engine)
            args = (t["poke_pos"], t["poke_flow"], t["query_pos"])
            for flag in (1, 0):
                x, _ = predictor.engine.model.run(features, None, *args, torch.tensor([flag]))
                mixture = mixture_of(predictor.engine.model.head(x).float(), model.config)
                assert_mixture(mixture, z, f"static{flag}.", tolerance)
        pos, flow, queries = (x[0].numpy() for x in args)
        free = predictor.predict(scene, pos[:0], flow[:0], queries)
        expected = {k: v[0] for k, v in z.items() if k.startswith("nopoke_static1.")}
        assert_mixture(free, expected, "nopoke_static1.", tolerance)
        if precision == "fp32":
            coarsest = features.maps[0]
            assert_close(coarsest[0, :, 0, 0], z["feat_row0"], 1e-4)
            assert_close(coarsest[:, ::16, ::4, ::4], z["feat_probe"], 1e-4)
            assert_close([coarsest.mean(), coarsest.std()], z["feat_mean_std"], 1e-4)
