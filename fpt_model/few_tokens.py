# SPDX-License-Identifier: MIT
"""The layers of a prepared model for a few tokens on the CPU: one call into C++, not hundreds.

The C++ is few_tokens.cpp beside this file; fpt_model/native.py builds it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpt_model.layers import Rotation
from fpt_model.model import FlowPokeTransformer, KeyValue
from fpt_model.native import TYPES, function

MOST_TOKENS = 16
"""With more, the products are no longer bound by reading the weights."""


class FewTokens:
    """Stands in for :meth:`FlowPokeTransformer.run_layers` of one prepared model.

    Hands on to it what it cannot do: more tokens than `MOST_TOKENS`, several images, queries that
    see a part of the pokes. Sums are in float32, also between bfloat16's products. A deep copy of
    the model goes on using the weights of the first. BuildError where the C++ cannot be built,
    ValueError for a model that it is not made for.
    """

    def __init__(self, model: FlowPokeTransformer) -> None:
        config, dtype = model.config, model.layers[0].self_qkv.weight.dtype
        if config.head_dim % 32 or dtype not in TYPES:
            raise ValueError(
                "expected heads of a multiple of 32 channels and weights of "
                f"{[str(t) for t in TYPES]}, received {config.head_dim} and {dtype}"
            )
        self._otherwise = model.run_layers
        self._heads, self._head_dim, self._dtype = config.heads, config.head_dim, dtype
        self._hidden = config.width * config.ffn_expand
        self.weights: list[nn.Linear] = []  # what must stay as it is
        self._tensors = []
        for layer in model.layers:
            own = [layer.self_qkv, layer.self_out, layer.cross_q, layer.ffn_up, layer.ffn_down]
            norms = layer.self_norm, layer.cross_norm, layer.ffn_norm  # folded, with a buffer each
            scales = [norm.get_buffer("scales") for norm in norms]
            scales += [layer.self_scale, layer.cross_scale]
            self.weights += own
            self._tensors.append(
                [t.detach().float().contiguous() for t in scales]
                + [linear.weight.detach().contiguous() for linear in own]
            )
        self._pointers = np.zeros((len(model.layers), len(self._tensors[0]) + 4), np.uint64)
        self._pointers[:, :-4] = [[t.data_ptr() for t in own] for own in self._tensors]
        most = f"-DMOST_TOKENS={MOST_TOKENS}"
        self._function = function("few_tokens", "run_layers", config.head_dim, dtype, most)
        self._function.argtypes = [ctypes.c_void_p] * 6

    def __deepcopy__(self, memo: Any) -> FewTokens:
        return self  # nothing of it changes, and it keeps its weights

    def __call__(
        self,
        x: Tensor,
        pokes: int,
        rotation: Rotation,
        cond: Tensor,
        memory: Sequence[KeyValue],
        past: Sequence[KeyValue | tuple[None, None]],
        known: int,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """:meth:`FlowPokeTransformer.run_layers`."""
        batch, tokens = x.shape[:2]
        images, _, image_tokens, _ = memory[0][0].shape
        if not 0 < batch * tokens <= MOST_TOKENS or images > 1 or hidden is not None:
            return self._otherwise(x, pokes, rotation, cond, memory, past, known, hidden)
        for own in memory:
            self._check_memory(own, image_tokens)
        kept = [self._with_place(own, batch, known, pokes) for own in past]
        pointers = self._pointers.copy()
        pointers[:, -4:] = [
            [t.data_ptr() for t in (*image, *own)] for image, own in zip(memory, kept, strict=True)
        ]
        shape = [len(kept), batch, tokens, pokes, known, kept[0][0].shape[2], self._heads]
        shape += [image_tokens, self._hidden, torch.get_num_threads()]
        sizes = np.array(shape, np.int64)
        x = x.to(torch.float32, copy=True).contiguous()  # is written to
        inputs = [t.contiguous() for t in (*rotation, cond)] + [x]
        self._function(sizes.ctypes.data, pointers.ctypes.data, *(t.data_ptr() for t in inputs))
        return x, kept

    def _check_memory(self, memory: KeyValue, image_tokens: int) -> None:
        """C++ is told where it lies, and nothing else."""
        expected = 1, self._heads, image_tokens, self._head_dim
        for t in memory:
            if t.shape != expected or t.dtype != self._dtype or not t.is_contiguous() or t.is_cuda:
                raise ValueError(
                    f"expected contiguous keys and values {list(expected)} of the image in "
                    f"{self._dtype}, received {list(t.shape)}, strides {t.stride()}, in {t.dtype} "
                    f"on {t.device}"
                )

    def _with_place(
        self, past: KeyValue | tuple[None, None], batch: int, known: int, pokes: int
    ) -> KeyValue:
        """Keys and values of known pokes, and room for the new ones: ``past`` itself if it has."""
        k, v = past
        if k is None or v is None:
            k = v = torch.empty(batch, self._heads, 0, self._head_dim, dtype=self._dtype)
        expected = batch, self._heads, max(known, k.shape[2]), self._head_dim
        if k.shape != expected or v.shape != expected or not k.dtype == v.dtype == self._dtype:
            raise ValueError(
                f"expected a context of {known} pokes for {batch} rows in {self._dtype}, "
                f"received keys {list(k.shape)} in {k.dtype}"
            )
        if k.shape[2] < known + pokes:
            k, v = (functional.pad(t[:, :, :known], (0, 0, 0, pokes)) for t in (k, v))
        return k.contiguous(), v.contiguous()
