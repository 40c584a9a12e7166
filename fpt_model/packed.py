# SPDX-License-Identifier: MIT
"""Linear layers for inference on the CPU by oneDNN.

In bfloat16 their weights lie in memory as its products read them: a product of few rows is bound by
reading the weights, and torch's own layout is read at about half of the memory's rate, since oneDNN
must rearrange it on the way. In float32 it takes the place of MKL where that does not use all of
the processor.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from functools import cache
from itertools import count
from typing import Any, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_model.layers import QKV
from fpt_model.model import TokenEmbedding

_LEAST = 2**19
"""Weights of fewer elements stay in the caches, where the layout matters less than the call."""

# Of two threads, oneDNN leaves one idle in products of more than 384 and fewer than 2048 rows with
# up to 1024 columns, as those of fpt-base's 1029 image tokens to the width 768: parts of 384 rows
# are 1.4 to 1.6 times as fast.
_NARROW, _PART, _MANY = 1024, 384, 2048

_packed: dict[int, tuple[Tensor, Tensor | None]] = {}  # weight and bias by handle
_handles = count()

# torch.compile cannot look into oneDNN's tensors: compiled code gets a number in their place, in a
# tensor, so that the layers of a stack still share their code.
_library = torch.library.Library("fpt_model", "DEF")
_library.define("packed_linear(Tensor x, Tensor handle, int out_features) -> Tensor")


def packed_weight(handle: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight, in oneDNN's layout, and bias that an operation's ``handle`` stands for."""
    return _packed[int(handle)]


@torch.library.impl(_library, "packed_linear", "CPU")
def _packed_linear(x: Tensor, handle: Tensor, out_features: int) -> Tensor:
    weight, bias = packed_weight(handle)

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    rows = x.numel() // x.shape[-1]
    if out_features <= _NARROW and _PART < rows < _MANY and torch.get_num_threads() <= 2:
        parts = [product(part) for part in x.flatten(0, -2).split(_PART)]
        return torch.cat(parts).view(*x.shape[:-1], out_features)
    return product(x)


@torch.library.register_fake("fpt_model::packed_linear", lib=_library)
def _shape(x: Tensor, handle: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@cache
def can_pack() -> bool:
    """Whether this processor and this torch have packed products of bfloat16."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        linear = nn.Linear(4, 4, dtype=torch.bfloat16)
        with torch.inference_mode():
            PackedLinear(linear)(torch.zeros(1, 4, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):  # torch built without oneDNN, or another interface
        return False
    return True


class PackedLinear(nn.Module):
    """What ``linear``, of bfloat16 on the CPU, computes; it does not keep its weight."""

    handle: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        number = next(_handles)
        bias = None if linear.bias is None else linear.bias.detach()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        _packed[number] = weight, bias
        # not at exit: a thread may still be at work then
        weakref.finalize(self, _packed.pop, number).atexit = False
        self.register_buffer("handle", torch.tensor(number), persistent=False)
        self.out_features = linear.out_features

    def __deepcopy__(self, memo: Any) -> PackedLinear:
        return self  # nothing of it changes, and its weight lives as long as it does

    def __reduce__(self) -> Never:
        raise TypeError("a packed layer cannot be pickled: its weight is not in it; save the model")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return torch.ops.fpt_model.packed_linear(x, self.handle, self.out_features)


class PackedQKV(PackedLinear):
    """A :class:`~fpt_model.layers.QKV`; its part for values alone is packed a second time."""

    def __init__(self, linear: QKV) -> None:
        super().__init__(linear)
        width = linear.in_features
        values = nn.Linear(width, width, bias=False, device="meta")
        values.weight = nn.Parameter(linear.weight.detach().chunk(3)[2], requires_grad=False)
        self.values = PackedLinear(values)


def pack(model: nn.Module, others: Collection[nn.Module] = ()) -> None:
    """Replace the large linear layers of bfloat16 of ``model`` but ``others``, in place."""
    for module, name in list(_linear_layers(model, torch.bfloat16)):
        child = getattr(module, name)
        if child.weight.numel() >= _LEAST and child not in others:
            packed = PackedQKV(child) if isinstance(child, QKV) else PackedLinear(child)
            setattr(module, name, packed)


def _linear_layers(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, str]]:
    """Those that may be replaced, by the module that calls them and their name there."""
    for module in model.modules():
        if isinstance(module, TokenEmbedding):
            continue  # applies its weight in parts
        if getattr(module, "q_bias", None) is not None:
            continue  # timm's BEiT and EVA apply the weight themselves
        for name, child in module.named_children():
            # what is derived from these may compute something else
            if type(child) in (nn.Linear, QKV) and child.weight.dtype == dtype:
                yield module, name


_SMALL = 2**20
"""With fewer multiplications a call of oneDNN takes longer than MKL's whole product."""

_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "linear", "CPU")
def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in] weight [out, in]^T + bias [out]`` in float32 on the CPU, by oneDNN or MKL."""
    if x.numel() * len(weight) < _SMALL:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("fpt_model::linear", lib=_library)
def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class OneDNNLinear(nn.Linear):
    """What ``linear``, of float32 on the CPU, computes, with its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return torch.ops.fpt_model.linear(x, self.weight, self.bias)


class OneDNNQKV(OneDNNLinear):
    """A :class:`~fpt_model.layers.QKV`."""

    def values(self, x: Tensor) -> Tensor:
        """The values alone."""
        return torch.ops.fpt_model.linear(x, self.weight.chunk(3)[2], None)


def multiply_by_onednn(model: nn.Module) -> None:
    """Replace the linear layers of float32 of ``model``, in place; weights are shared."""
    for module, name in list(_linear_layers(model, torch.float32)):
        child = getattr(module, name)
        own = OneDNNQKV(child) if isinstance(child, QKV) else OneDNNLinear(child)
        setattr(module, name, own)
