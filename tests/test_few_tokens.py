# SPDX-License-Identifier: MIT
"""fpt_model.few_tokens: C++ that runs the layers for a few tokens as PyTorch does."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close

from fpt_model import FlowPokeTransformer, FPTConfig, few_tokens
from fpt_model.backends import Precision
from fpt_model.encoder import preprocess
from fpt_model.engine import PRECISIONS, TorchEngine, prepare
from fpt_model.engine import few_tokens as try_few_tokens
from fpt_model.few_tokens import FewTokens


@pytest.fixture(scope="module")
def model() -> FlowPokeTransformer:
    """Small, with every weight random: at initialisation residual branches are zero."""
    config = FPTConfig(
        name="small",
        encoder="vit_tiny_patch16_224",
        encoder_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=40,  # 25 image tokens: not whole vectors
        width=96,
        depth=3,
        head_dim=32,
        fit="stretch",
    )
    model = FlowPokeTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5)
    return model.eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_few_tokens_are_run_alike(model: FlowPokeTransformer, precision: Precision) -> None:
    """Pokes, queries, hypotheses; a context that grows, with room and without."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("needs a C++ compiler")
    plain = TorchEngine(model, "cpu", precision)
    few = copy.copy(plain)
    few.model = prepare(model, torch.device("cpu"), PRECISIONS[precision])
    runs = few.model.run_layers = FewTokens(few.model)
    used = []

    def function(*arguments: int, own: Any = runs._function) -> None:
        used.append(arguments)
        own(*arguments)

    runs._function = function
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    x = preprocess(image, model.config).numpy()
    features = plain.encode(x)
    tolerance = {"fp32": 1e-5, "bf16": 0.03}[precision]
    for rows, first, later in (
        (1, (0, 1), (0, 3)),
        (1, (1, 1), (1, 0)),
        (2, (3, 4), (1, 1)),
        (5, (2, 1), (0, 1)),
        (1, (6, 10), (2, 9)),
        (1, (20, 30), (1, 5)),  # first too many tokens
        (1, (1, 1), (5, 13)),  # later too many
    ):
        contexts: list[Any] = [None, None]
        for static, (pokes, queries) in ((True, first), (False, later), (True, later)):
            arguments = (
                rng.random((rows, pokes, 2), np.float32),
                rng.normal(0, 0.1, (rows, pokes, model.config.flow_dim)).astype(np.float32),
                rng.random((rows, queries, 2), np.float32),
                static,
            )
            (expected, contexts[0]), (found, contexts[1]) = (
                engine.run(features, context, *arguments)
                for engine, context in zip((plain, few), contexts, strict=True)
            )
            scale = max(1.0, np.abs(expected).max(initial=0))
            assert_close(found, expected, tolerance * scale)
            assert contexts[0].pokes == contexts[1].pokes
            if rows == 1:
                contexts = [c.with_room(1, 7) for c in contexts]
    assert len(used) == 18  # the other 3 are too many tokens


def test_without_a_compiler_few_tokens_run_slowly(
    model: FlowPokeTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(few_tokens, "_library", few_tokens._library.__wrapped__)
    for compiler, reason in (("no-compiler", "No such file"), ("false", "failed")):
        monkeypatch.setenv("CXX", compiler)
        assert try_few_tokens(prepared) is None
        assert f"{compiler}" in caplog.text
        assert reason in caplog.text
    assert not list(tmp_path.rglob("*.so"))
