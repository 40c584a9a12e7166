# SPDX-License-Identifier: MIT
"""The layers of a prepared model on the CPU: one call into C++, not hundreds.

A few tokens by few_tokens.cpp, many queries by query_layers.cpp beside this file, which
fpt_model/native.py builds.
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
from fpt_model.model import FlowPokeTransformer, KeyValue, Layer
from fpt_model.native import TYPES, function

MOST_TOKENS = 16
"""With more, the products are no longer bound by reading the weights."""
MOST_WEIGHTS = 2**22
"""With more, not all layers' weights are in the caches at once."""


class _NativeLayers:
    """Stands in for :meth:`FlowPokeTransformer.run_layers` of one prepared model.

    Hands on to what stood there before what it cannot do: several images, queries that see a part
    of the pokes, and what each kind says. Sums are in float32, also between bfloat16's products. A
    deep copy of the model goes on using the weights of the first. BuildError where the C++ cannot
    be built, ValueError for a model that it is not made for.
    """

    _RUNS_POKES: bool  # or hands new ones on, too

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
        self._function = self._built("run_layers")
        self._function.argtypes = [ctypes.c_void_p] * 6
        self._tensors = [self._scales(layer) + self._weights(layer) for layer in model.layers]
        # a row for each layer's struct in C++, with room for keys and values
        places = [[t.data_ptr() for t in own] + 4 * [0] for own in self._tensors]
        self._pointers = np.array(places, np.uint64)

    def _built(self, symbol: str) -> Any:
        raise NotImplementedError

    def _weights(self, layer: Layer) -> list[Tensor]:
        """The matrices in the order of the struct."""
        raise NotImplementedError

    @staticmethod
    def _scales(layer: Layer) -> list[Tensor]:
        norms = layer.self_norm, layer.cross_norm, layer.ffn_norm  # folded, with a buffer each
        own = [norm.get_buffer("scales") for norm in norms]
        own += [layer.self_scale, layer.cross_scale]
        return [t.detach().float().contiguous() for t in own]

    def __deepcopy__(self, memo: Any) -> _NativeLayers:
        return self  # nothing of it changes, and it keeps its weights

    def _takes(self, batch: int, pokes: int, queries: int) -> bool:
        raise NotImplementedError

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
        taken = self._takes(batch, pokes, tokens - pokes)
        if not taken or len(memory[0][0]) > 1 or hidden is not None:
            return self._otherwise(x, pokes, rotation, cond, memory, past, known, hidden)
        if pokes and not self._RUNS_POKES:
            poked, asked = x[:, :pokes], x[:, pokes:]
            of_poked, of_asked = (
                (rotation[0][:, :, part], rotation[1][:, :, part])
                for part in (slice(pokes), slice(pokes, None))
            )
            poked, past = self._otherwise(poked, pokes, of_poked, cond, memory, past, known)
            asked, past = self(asked, 0, of_asked, cond, memory, past, known + pokes)
            return torch.cat([poked, asked], 1), past
        x = x.to(torch.float32, copy=True).contiguous()  # is written to
        kept = [self._with_place(own, batch, known, pokes) for own in past]
        image_tokens = memory[0][0].shape[2]
        self._check_memory(memory, image_tokens)
        pointers = self._pointers.copy()
        pointers[:, -4:] = [
            [t.data_ptr() for t in (*image, *own)] for image, own in zip(memory, kept, strict=True)
        ]
        shape = [len(kept), batch, tokens, pokes, known, kept[0][0].shape[2], self._heads]
        shape += [image_tokens, self._hidden, torch.get_num_threads()]
        sizes = np.array(shape, np.int64)
        inputs = [t.contiguous() for t in (*rotation, cond)] + [x]
        self._function(sizes.ctypes.data, pointers.ctypes.data, *(t.data_ptr() for t in inputs))
        return x, kept

    def _check_memory(self, memory: Sequence[KeyValue], image_tokens: int) -> None:
        """C++ is told where it lies, and nothing else."""
        expected = 1, self._heads, image_tokens, self._head_dim
        for t in (t for own in memory for t in own):
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


class FewTokens(_NativeLayers):
    """For at most `MOST_TOKENS`."""

    _RUNS_POKES = True

    def __init__(self, model: FlowPokeTransformer) -> None:
        self.weights: list[nn.Linear] = []  # what must stay as it is
        super().__init__(model)

    def _built(self, symbol: str) -> Any:
        most = f"-DMOST_TOKENS={MOST_TOKENS}"
        return function("few_tokens", symbol, self._head_dim, self._dtype, most)

    def _weights(self, layer: Layer) -> list[Tensor]:
        own = [layer.self_qkv, layer.self_out, layer.cross_q, layer.ffn_up, layer.ffn_down]
        self.weights += own
        return [linear.weight.detach().contiguous() for linear in own]

    def _takes(self, batch: int, pokes: int, queries: int) -> bool:
        return 0 < batch * (pokes + queries) <= MOST_TOKENS


class QueryLayers(_NativeLayers):
    """For more queries than `MOST_TOKENS`, in a small model; new pokes do not see them."""

    _RUNS_POKES = False

    def _built(self, symbol: str) -> Any:
        return function("query_layers", symbol, self._head_dim, self._dtype)

    @staticmethod
    def suits(model: FlowPokeTransformer) -> bool:
        """Whether the weights of all layers together are few."""
        return sum(p.numel() for layer in model.layers for p in layer.parameters()) <= MOST_WEIGHTS

    def _weights(self, layer: Layer) -> list[Tensor]:
        packing, unit = self._built("packing"), np.zeros(2, np.int64)
        packing.argtypes = [ctypes.c_void_p]
        packing(unit.ctypes.data)
        pair, wide = (int(n) for n in unit)
        qkv, out = layer.self_qkv.weight, layer.self_out.weight
        # what a query that sees no pokes adds: its own value
        alone = (out.float() @ qkv.chunk(3)[2].float()).to(out.dtype)
        halves = (t.unflatten(0, (-1, wide // 2)) for t in layer.ffn_up.weight.chunk(2))
        up = torch.stack(list(halves), 1).flatten(0, 2)
        own = [qkv, out, alone, layer.cross_q.weight, layer.ffn_down.weight, up]
        # without a pair of bfloat16 the compiler knows no products of them, and takes floats
        dtype = self._dtype if pair == 2 else torch.float32
        panels = (w.detach().unflatten(0, (-1, wide)).unflatten(-1, (-1, pair)) for w in own)
        return [panel.transpose(1, 2).to(dtype).contiguous() for panel in panels]

    def _takes(self, batch: int, pokes: int, queries: int) -> bool:
        return batch * queries > MOST_TOKENS
