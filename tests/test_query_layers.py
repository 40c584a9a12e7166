# SPDX-License-Identifier: MIT
"""fpt_model.native_layers.QueryLayers: C++ that runs many queries as PyTorch does."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from compilers import needs_compiler
from layer_runs import TOLERANCE, assert_run_alike, counting
from random_weights import randomised
from scenes_apart import assert_scenes_apart
from torch import Tensor
from torch._dynamo.utils import counters

from fpt_model import (
    FlowPokeTransformer,
    FlowPredictor,
    FPTConfig,
    engine,
    native,
    native_layers,
)
from fpt_model.engine import PRECISIONS, prepare, use_query_layers
from fpt_model.native import compiler
from fpt_model.native_layers import QueryLayers
from fpt_model.processor import description

pytestmark = [
    pytest.mark.usefixtures("build_cache"),
    needs_compiler,
    pytest.mark.skipif("avx512f" not in description(), reason="needs AVX-512"),
]
PRECISION = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def small(head_dim: int) -> FlowPokeTransformer:
    config = FPTConfig(
        name="small",
        encoder="vit_tiny_patch16_224",
        encoder_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=56,  # 49 image tokens: not whole panels
        width=192,
        depth=3,
        head_dim=head_dim,
        fit="stretch",
    )
    return randomised(FlowPokeTransformer(config))


@pytest.fixture(scope="module", params=[32, 64, 96])
def model(request: pytest.FixtureRequest) -> FlowPokeTransformer:
    return small(request.param)


@PRECISION
def test_many_queries_are_run_alike(
    model: FlowPokeTransformer, precision: str, threads: int
) -> None:
    """Pokes, queries, hypotheses; a context that grows, with room and without."""
    cases = (
        (1, (0, 17), (0, 100)),
        (1, (1, 250), (2, 30)),  # tiles, the last not full, and blocks that are not
        (1, (40, 96), (1, 40)),
        (3, (2, 40), (3, 17)),
        (5, (0, 7), (1, 101)),
        (1, (1, 16), (20, 0)),  # few, none
        (19, (2, 1), (0, 3)),  # several rows in a tile
        (60, (0, 4), (1, 1)),
    )
    calls = assert_run_alike(model, precision, QueryLayers, cases)
    used = [(rows, n) for rows, first, later in cases for _, n in (first, later, later)]
    used = [(rows, queries) for rows, queries in used if rows * queries > 16]
    assert [(c[1], c[2]) for c in calls] == used


def arguments(
    prepared: FlowPokeTransformer, rows: int, pokes: int, queries: int, seed: int = 0
) -> dict[str, Any]:
    """Of ``run_layers``, with contexts of 4 pokes in room for 9."""
    config, rng = prepared.config, torch.Generator().manual_seed(seed)

    def keys_values(*shape: int) -> list[tuple[Tensor, ...]]:
        return [
            tuple(torch.randn(*shape, config.head_dim, generator=rng) for _ in "kv")
            for _ in range(config.depth)
        ]

    return {
        "x": torch.randn(rows, pokes + queries, config.width, generator=rng),
        "pokes": pokes,
        "rotation": prepared.rope(torch.rand(rows, pokes + queries, 2, generator=rng)),
        "cond": torch.tensor([1, 0, 1, 1, 0])[:rows],
        "memory": keys_values(1, config.heads, 32),
        "past": keys_values(rows, config.heads, 9),
        "known": 4,
    }


def test_each_row_has_its_room_and_its_flag(model: FlowPokeTransformer, threads: int) -> None:
    """As in hypotheses, and beyond: rows with another past and another flag."""
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    many = QueryLayers(prepared)
    for pokes in (0, 2):
        own = arguments(prepared, 3, pokes, 50)
        x = own["x"].clone()
        found, expected = (
            run(**own | {"past": copy.deepcopy(own["past"])}) for run in (many, prepared.run_layers)
        )
        assert_close(found[0], expected[0], 1e-4)
        for mine, theirs in zip(found[1], expected[1], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert_close(a[:, :, : 4 + pokes], b[:, :, : 4 + pokes], 1e-5)
        assert torch.equal(x, own["x"])  # what was given stays


def test_threads_do_not_show() -> None:
    prepared = prepare(small(64), torch.device("cpu"), torch.float32)
    many = QueryLayers(prepared)
    own = [arguments(prepared, 2, 1, 130, seed) for seed in range(4)]
    alone = [many(**a)[0] for a in own]
    with ThreadPoolExecutor(4) as pool:
        for i, (found, _) in enumerate(pool.map(lambda i: many(**own[i % 4]), range(60))):
            assert torch.equal(found, alone[i % 4])


@PRECISION
def test_neither_order_nor_company_shows(
    model: FlowPokeTransformer, precision: str, threads: int
) -> None:
    """A query's answer is its own, in whatever tile it comes."""
    prepared = prepare(model, torch.device("cpu"), PRECISIONS[precision])
    many, dtype = QueryLayers(prepared), PRECISIONS[precision]
    own = arguments(prepared, 2, 0, 150)
    for name in ("memory", "past"):
        own[name] = [tuple(t.to(dtype) for t in kv) for kv in own[name]]
    alone, _ = many(**own)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for queries in (order, torch.arange(9, 40)):
        cos, sin = (t[:, :, queries] for t in own["rotation"])
        found, _ = many(**own | {"x": own["x"][:, queries], "rotation": (cos, sin)})
        assert torch.equal(found, alone[:, queries])
    second = {
        "x": own["x"][1:],
        "rotation": tuple(t[1:] for t in own["rotation"]),
        "cond": own["cond"][1:],
        "past": [tuple(t[1:] for t in kv) for kv in own["past"]],
    }
    assert torch.equal(many(**own | second)[0], alone[1:])


@pytest.mark.skipif(compiler() != ["g++"], reason="asks g++ for less than there is")
def test_bfloat16_without_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older compiler builds it."""
    monkeypatch.setenv("CXX", "g++ -mno-avx512bf16")
    monkeypatch.setattr(native_layers, "function", native.function.__wrapped__)
    prepared = prepare(small(64), torch.device("cpu"), torch.bfloat16)
    many, own = QueryLayers(prepared), arguments(prepared, 2, 0, 50)
    for name in ("memory", "past"):
        own[name] = [tuple(t.bfloat16() for t in kv) for kv in own[name]]
    assert_close(many(**own)[0], prepared.run_layers(**own)[0].float(), 0.1)


def test_what_it_is_not_made_for(model: FlowPokeTransformer) -> None:
    """Is run by torch, or refused before C++ is told where it lies."""
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    many = QueryLayers(prepared)
    calls = counting(many)
    own = arguments(prepared, 2, 1, 30)
    hidden = torch.zeros(30, 5, dtype=torch.bool)
    hidden[:, 1] = True
    two = [tuple(torch.cat([t, t]) for t in kv) for kv in own["memory"]]
    for change in ({"hidden": hidden}, {"memory": two}):
        found, expected = (
            run(**own | {"past": copy.deepcopy(own["past"])} | change)[0]
            for run in (many, prepared.run_layers)
        )
        assert torch.equal(found, expected)
    assert not calls
    heads, head_dim = prepared.config.heads, prepared.config.head_dim
    for change in (lambda t: t[..., :16], lambda t: t.mT, lambda t: t.double()):
        others = [(k, change(v)) for k, v in own["memory"]]
        with pytest.raises(
            ValueError, match=rf"contiguous keys and values \[1, {heads}, 32, {head_dim}\]"
        ):
            many(**own | {"memory": others, "pokes": 0})
    short = [(k[:1], v[:1]) for k, v in own["past"]]
    with pytest.raises(ValueError, match="expected a context of 4 pokes for 2 rows"):
        many(**own | {"past": short, "pokes": 0})
    assert not calls


@PRECISION
def test_the_compiled_engine_uses_it(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few_tokens for the pokes; not for a model of which not all layers stay in the caches."""
    monkeypatch.setattr(engine, "multiplies_faster", lambda dtype: True)
    model = small(64)
    fast, plain = (FlowPredictor(model, precision=precision, compile=c) for c in (True, False))
    runs = fast.engine.model.run_layers
    assert isinstance(runs, QueryLayers)
    calls = counting(runs)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found, expected = (
        p.predict(p.encode(image), [[0.4, 0.5]], [[0.1, 0.0]], np.linspace(0, 1, 60).reshape(30, 2))
        for p in (fast, plain)
    )
    assert len(calls) == 1
    assert_close(found.means, expected.means, TOLERANCE[precision])
    monkeypatch.setattr(native_layers, "MOST_WEIGHTS", 1000)
    large = FlowPredictor(model, precision=precision, compile=True)
    assert not isinstance(large.engine.model.run_layers, QueryLayers)


@PRECISION
def test_two_scenes_at_once(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiled engine, with all that it runs by C++: threads do not disturb each other."""
    monkeypatch.setattr(engine, "multiplies_faster", lambda dtype: True)
    predictor = FlowPredictor(small(64), precision=precision, compile=True)
    rng = np.random.default_rng(0)
    pictures, many = rng.integers(0, 256, (2, 48, 64, 3), dtype=np.uint8), rng.random((40, 2))
    assert_scenes_apart(predictor, list(pictures), [many, many[:1]])


@pytest.mark.parametrize("own", [False, True])
def test_a_warm_model_compiles_nothing_more(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether our own C++ runs many queries or torch.compile's does."""
    monkeypatch.setattr(engine, "multiplies_faster", lambda dtype: own)
    torch.compiler.reset()
    predictor = FlowPredictor(small(64), compile=True)
    predictor.warm_up()
    before, rng = counters["stats"]["unique_graphs"], np.random.default_rng(0)
    assert before
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for size in ((5, 9), (64, 64), (70, 70)):  # the last more than fit into a pass
        for pokes in (1, 2, 7, 0):
            scene = predictor.encode(image)
            predictor.influence(scene, rng.random((pokes, 2)), rng.random((pokes, 2)), size)
    assert counters["stats"]["unique_graphs"] == before


def test_without_a_compiler_torch_runs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setattr(engine, "multiplies_faster", lambda dtype: True)
    monkeypatch.setattr(native_layers, "function", native.function.__wrapped__)
    prepared = prepare(small(64), torch.device("cpu"), torch.float32)
    with caplog.at_level(logging.WARNING):
        use_query_layers(prepared, torch.float32)
    assert "many queries are run by torch.compile's code" in caplog.text
    assert "No such file" in caplog.text
    assert not isinstance(prepared.run_layers, QueryLayers)
