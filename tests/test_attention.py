# SPDX-License-Identifier: MIT
"""Attention written out for bfloat16: the same as the exact one, whatever the parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpt_model import attention
from fpt_model.attention import OwnAttention, attend_in_parts, scaled_dot_product_attention


def heads(rows: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Queries of ``rows`` tokens, keys and values of 70, as views into the products' outputs."""
    torch.manual_seed(0)
    own, image = torch.randn(batch, rows, 3 * 64), torch.randn(batch, 70, 2 * 3 * 64)
    split = [t.unflatten(-1, (3, 64)).transpose(1, 2) for t in (own, *image.chunk(2, -1))]
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


def test_torch_compile_is_told_the_truth() -> None:
    """Of the output's shape, type and place in memory."""
    torch.library.opcheck(torch.ops.fpt_model.attend_in_parts.default, (*heads(40), 1.0))


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


@torch.inference_mode()
def test_other_peoples_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the mode they use ours, but where they ask for more than it can."""
    monkeypatch.setattr(attention, "_WRITTEN_OUT", True)
    q, k, v = heads(70)
    own = attend_in_parts(q, k, v, 0.125)
    torchs = F.scaled_dot_product_attention(q, k, v)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.equal(own, torchs)
    with OwnAttention():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), own)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0), own)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), causal)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), torchs)
