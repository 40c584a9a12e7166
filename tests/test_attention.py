# SPDX-License-Identifier: MIT
"""Our own attention, written out or in C++: the same as the exact one, whatever the parts."""

from __future__ import annotations

import logging
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from compilers import needs_compiler
from random_weights import randomised
from torch import Tensor

from fpt_model import FlowPokeTransformer, FlowPredictor, FPTConfig, attention, engine, native
from fpt_model.attention import (
    AttendBy,
    attend_in_parts,
    attend_natively,
    native_attention,
    scaled_dot_product_attention,
)
from fpt_model.model import Layer
from fpt_model.native import compiler

OWN = torch.ops.fpt_model
pytestmark = pytest.mark.usefixtures("build_cache")


def heads(
    rows: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    keys: int = 70,
    head_dim: int = 64,
) -> tuple[Tensor, ...]:
    """Queries of ``rows`` tokens, and keys and values, as views into the products' outputs."""
    torch.manual_seed(0)
    own, image = (torch.randn(batch, n, 3 * head_dim) for n in (rows, 2 * keys))
    image = image.unflatten(1, (keys, 2)).flatten(2)
    split = [t.unflatten(-1, (3, head_dim)).transpose(1, 2) for t in (own, *image.chunk(2, -1))]
    q, k, v = (t.to(dtype) for t in split)
    return F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1) * 3, v


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    weights = (scale * q.double() @ k.double().transpose(-1, -2)).softmax(-1)
    return weights @ v.double()


# all rows at once; parts that fit and one left over; a row each
@pytest.mark.parametrize("part", [2**20, 3 * 70 * 10, 3 * 70 * 2 * 7, 1])
@pytest.mark.parametrize(("rows", "batch"), [(40, 1), (33, 2)])
@torch.inference_mode()
def test_parts_do_not_show(
    rows: int, batch: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = heads(rows, batch)
    monkeypatch.setattr(attention, "_PART", part)
    found = attend_in_parts(q, k, v, 1.0)
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    assert found.transpose(1, 2).is_contiguous()
    # logits of up to 9, rounded to 8 bits, and weights and sums that are
    torch.testing.assert_close(found.double(), exact(q, k, v), rtol=0.01, atol=0.03)
    assert torch.equal(q, heads(rows, batch)[0])  # nothing was written into what was given


@torch.inference_mode()
def test_scale() -> None:
    q, k, v = heads(40)
    found = attend_in_parts(q, k, v, 0.125)
    torch.testing.assert_close(found.double(), exact(q, k, v, 0.125), rtol=0.01, atol=0.01)


# a query less and more than a block, keys of which a part of a vector is left, and one key
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
@pytest.mark.parametrize(
    ("rows", "batch", "keys"), [(37, 2, 70), (5, 1, 400), (1, 1, 64), (7, 3, 1)]
)
@needs_compiler
@torch.inference_mode()
def test_in_cpp(rows: int, batch: int, keys: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = heads(rows, batch, dtype, keys, head_dim)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 0.015}[dtype]
    for scale in (1.0, 0.125):
        found = attend_natively(q, k, v, scale)
        assert (found.shape, found.dtype) == (q.shape, dtype)
        assert found.transpose(1, 2).is_contiguous()
        assert_close(found.double(), exact(q, k, v, scale), tolerance)
    for change in (Tensor.contiguous, lambda t: t.mT.contiguous().mT):  # other places in memory
        assert torch.equal(attend_natively(*map(change, (q, k, v)), scale), found)


@pytest.mark.parametrize("without", ["avx512f", "avx512bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(
    platform.machine() != "x86_64" or compiler() != ["g++"],
    reason="asks g++ for less than x86-64 has",
)
@needs_compiler
@torch.inference_mode()
def test_in_cpp_of_lesser_processors(
    dtype: torch.dtype, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"g++ -mno-{without}")
    monkeypatch.setattr(native, "function", native.function.__wrapped__)
    q, k, v = heads(37, 2, dtype)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 0.015}[dtype]
    assert_close(attend_natively(q, k, v, 1.0).double(), exact(q, k, v), tolerance)


@needs_compiler
@torch.inference_mode()
def test_in_cpp_with_logits_far_apart() -> None:
    """As large as a trained scale may get: no overflow, and what weighs nothing adds nothing."""
    q, k, v = heads(40, dtype=torch.float32)
    q = q * 200
    assert_close(attend_natively(q, k, v, 1.0).double(), exact(q, k, v), 2e-4)
    q, k = torch.full_like(q, -1e3), torch.full_like(k, 1e3)
    assert_close(attend_natively(q, k, v, 1.0), v.mean(2, keepdim=True).expand_as(q), 1e-5)


@needs_compiler
@torch.inference_mode()
def test_threads_do_not_show() -> None:
    q, k, v = heads(200, 2)
    before, expected = torch.get_num_threads(), attend_natively(q, k, v, 1.0)
    for threads in (1, 5):
        torch.set_num_threads(threads)
        assert torch.equal(attend_natively(q, k, v, 1.0), expected)
    torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: attend_natively(q, k, v, 1.0), range(50)):
            assert torch.equal(found, expected)


@torch.inference_mode()
def test_what_cpp_is_not_made_for() -> None:
    q, k, v = heads(40)
    for bad in ((q, k[:, :2], v), (q, k, v[..., :32]), (q, k.float(), v)):
        with pytest.raises(ValueError, match=r"expected keys and values \[1, 3, 70, 64\] in"):
            attend_natively(*bad, 1.0)
    with pytest.raises(ValueError, match=r"\[1, 3, 1, 64\].*received \[1, 3, 0, 64\]"):
        attend_natively(q, k[:, :, :0], v[:, :, :0], 1.0)
    with pytest.raises(ValueError, match=r"multiple of 32 channels.*received 48 in"):
        attend_natively(*heads(40, head_dim=48), 1.0)
    with pytest.raises(ValueError, match=r"received 64 in torch\.float64"):
        attend_natively(*heads(40, dtype=torch.float64), 1.0)


@pytest.mark.parametrize(
    "name", ["attend_in_parts", pytest.param("attend_natively", marks=needs_compiler)]
)
def test_torch_compile_is_told_the_truth(name: str) -> None:
    """Of the output's shape, type and place in memory."""
    torch.library.opcheck(getattr(OWN, name).default, (*heads(40), 1.0))


@pytest.fixture
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which ours is chosen."""
    monkeypatch.setattr(attention, "_WRITTEN_OUT", True)
    monkeypatch.setattr(attention, "multiplies_faster", lambda dtype: True)


@pytest.mark.parametrize("written_out", [False, True])
def test_what_is_left_to_torch(written_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, gradients, masks and few queries: bit by bit, on any processor."""
    monkeypatch.setattr(attention, "_WRITTEN_OUT", written_out)
    q, k, v = heads(40)
    mask = torch.zeros(40, 70, dtype=torch.bfloat16)
    mask[:, 5:] = -torch.inf
    few = q[:, :, :4]
    cases = [(q.float(), k.float(), v.float(), None), (q, k, v, mask), (few, k, v, None)]
    with torch.inference_mode():
        for *args, m in cases:
            found = scaled_dot_product_attention(*args, m, scale=1.0)
            assert torch.equal(found, F.scaled_dot_product_attention(*args, m, scale=1.0))
    found = scaled_dot_product_attention(q.requires_grad_(), k, v)
    found.sum().backward()
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v))
    assert q.grad is not None


@needs_compiler
@torch.inference_mode()
def test_cpp_where_it_is_faster(any_processor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the written-out or torch's for all that it was not built for."""
    own = native_attention(64, torch.float32)
    assert own is not None
    q, k, v = heads(40, dtype=torch.float32)
    assert torch.equal(own(q, k, v, scale=1.0), attend_natively(q, k, v, 1.0))
    assert torch.equal(own(q, k, v), attend_natively(q, k, v, 0.125))
    others = [
        (q[:, :, :4], k, v),
        (q, k, torch.cat([v, v], -1)),  # as in differential attention
        (q, k, v, torch.zeros(40, 70)),
        heads(40),
        heads(40, head_dim=96),
    ]
    for arguments in others:
        assert torch.equal(own(*arguments), scaled_dot_product_attention(*arguments))
    monkeypatch.setattr(attention, "multiplies_faster", lambda dtype: False)
    assert native_attention(64, torch.float32) is None
    assert native_attention(64, torch.bfloat16) is None


def model(encoder: str) -> FlowPokeTransformer:
    """With a vision transformer of more tokens than are few, or a convolutional encoder."""
    kwargs: dict = {"patch_size": 8, "embed_dim": 128, "depth": 1, "num_heads": 2}
    if encoder != "vit_tiny_patch16_224":
        kwargs = {"features_only": True, "out_indices": [0, 2, 3]}
    config = FPTConfig(
        name="small",
        encoder=encoder,
        encoder_kwargs=kwargs,
        image_size=64,
        width=128,
        depth=2,
        head_dim=64,
        fit="stretch",
        context_width=128,
        context_depth=1,
    )
    return randomised(FlowPokeTransformer(config))


@needs_compiler
@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_engines_attend_by_it(
    encoder: str, precision: str, any_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers' cross-attention, and the image encoder's."""
    own, calls = attention.native_attention, []

    def watched(*arguments: object) -> object:
        found = own(*arguments)

        def counted(q: Tensor, *others: object, **named: object) -> Tensor:
            calls.append(q.shape[2])
            return found(q, *others, **named)

        return torch.compiler.disable(counted)

    monkeypatch.setattr(engine, "native_attention", watched)
    monkeypatch.setattr(engine, "multiplies_faster", lambda dtype: False)  # as of large models
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    poke, queries = ([[0.4, 0.5]], [[0.1, 0.0]]), np.random.default_rng(1).random((100, 2))
    fast = FlowPredictor(model(encoder), precision=precision, compile=True)
    scene = fast.encode(image)
    encoding = len(calls)
    found = fast.predict(scene, *poke, queries)
    assert encoding == 1
    assert calls[1:] == 2 * [101]
    plain = FlowPredictor(model(encoder), precision=precision)
    assert all(layer.fused is Layer.fused for layer in plain.engine.model.layers)
    expected = plain.predict(plain.encode(image), *poke, queries)
    assert_close(found.means, expected.means, {"fp32": 1e-5, "bf16": 0.03}[precision])


def test_without_a_compiler_torch_attends(
    any_processor: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setattr(native, "function", native.function.__wrapped__)
    prepared = engine.prepare(model("vit_tiny_patch16_224"), torch.device("cpu"), torch.float32)
    with caplog.at_level(logging.WARNING):
        engine.use_native_attention(prepared, torch.float32)
    assert "torch's attention is used, not our own: [Errno 2] No such file" in caplog.text
    assert all(layer.fused is Layer.fused for layer in prepared.layers)


@torch.inference_mode()
def test_other_peoples_modules(any_processor: None) -> None:
    """Within the mode they use ours, but where they ask for more than it can."""
    q, k, v = heads(70)
    own = attend_in_parts(q, k, v, 0.125)
    torchs = F.scaled_dot_product_attention(q, k, v)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.equal(own, torchs)
    with AttendBy(scaled_dot_product_attention):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), own)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0), own)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), causal)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), torchs)
