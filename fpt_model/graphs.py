# SPDX-License-Identifier: MIT
"""Exported graphs: what they are called, which shapes they are run with, and their manifest.

A folder written by :func:`fpt_model.export.export` holds, for each precision, two graphs:

* ``encoder``: ``image [1, 3, S, S]`` in [-1, 1] to feature maps ``map_i [1, C_i, h_i, w_i]`` and
  each layer's cross-attention memory ``key_i``, ``value_i [1, H, N, E]``;
* ``decoder``: all of these, ``poke_pos [B, P, 2]``, ``poke_flow [B, P, D]`` and ``query_pos
  [B, Q, 2]`` (model coordinates), ``camera_static [B]`` and ``visible [Q]``, the number of leading
  pokes that a query sees, to ``raw [B, Q, raw_dim]``. B hypotheses share the one image.

The mixture is made of ``raw`` outside, see :func:`fpt_model.model.mixture_parameters`.

B, P and Q are free in the graph. They are padded to the buckets below, so that a backend that plans
for a shape meets few of them. Pokes attend to those before them only, a query to none that it does
not see and to no other query: padding at the end changes nothing. ``visible`` is 0 without pokes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fpt_model.engine import BackendError
from fpt_model.model import FlowPokeTransformer

Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, ...] = ("encoder", "decoder")

PRECISIONS = ("fp32", "fp16", "int8")
BATCH_BUCKETS = (1, 2, 4, 8, 16)
POKE_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
QUERY_BUCKETS = (1, 4, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

MANIFEST = "manifest.json"
_LARGEST_BUCKET = 1 << 16
# of the manifest, and of the graphs: raised whenever they take, give or compute something else
FORMAT = 3


def bucket(count: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``count``; beyond the largest, a multiple of it."""
    largest = buckets[-1]
    return next((b for b in buckets if b >= count), -(-count // largest) * largest)


def chunks(count: int, buckets: tuple[int, ...]) -> Iterator[slice]:
    """Consecutive ranges that make up ``count``, none longer than the largest bucket."""
    for start in range(0, count, buckets[-1]):
        yield slice(start, min(count, start + buckets[-1]))


def file_sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# of a model's configuration, what no graph computes with
_OUTSIDE = {"name", "licence", "horizon_s", "kl_threshold"}


def model_sha256(model: FlowPokeTransformer) -> str:
    """Of what a model computes, its numbers and weights, whatever file they came from."""
    inside = {k: v for k, v in model.config.to_dict().items() if k not in _OUTSIDE}
    digest = hashlib.sha256(json.dumps(inside, sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Graph:
    """One graph's file. Shapes hold numbers, and names of what is free.

    Raises ValueError for a file elsewhere than in the manifest's folder.
    """

    file: str
    sha256: str
    inputs: dict[str, tuple[str, list[int | str]]]  # by name: element type, shape
    outputs: dict[str, tuple[str, list[int | str]]]

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file:
            raise ValueError(f"expected graphs in its folder, received {self.file!r}")


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of graphs."""

    folder: Path
    model: str  # its name
    model_sha256: str  # of what was exported, see model_sha256()
    licence: str  # of the weights, which are in the graphs
    opset: int
    exported_with: dict[str, str]  # versions by package
    batch_buckets: tuple[int, ...]
    poke_buckets: tuple[int, ...]
    query_buckets: tuple[int, ...]
    graphs: dict[str, dict[Half, Graph]]  # by precision

    def write(self) -> None:
        """To the folder, atomically."""
        content = {"format": FORMAT} | asdict(self)
        del content["folder"]
        partial = self.folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.folder / MANIFEST)

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """BackendError when there is none, or none that this version can use."""
        folder = Path(folder).expanduser()
        path = folder / MANIFEST
        how = "fpt export --model MODEL --out FOLDER writes one"
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if (found := content.pop("format")) != FORMAT:
                raise ValueError(f"expected format {FORMAT}, received {found}: export again")
            for name in ("batch_buckets", "poke_buckets", "query_buckets"):
                content[name] = buckets = tuple(content[name])
                whole = all(isinstance(b, int) and 0 < b <= _LARGEST_BUCKET for b in buckets)
                if not (buckets and whole and list(buckets) == sorted(set(buckets))):
                    raise ValueError(
                        f"{name} must be growing numbers from 1 to {_LARGEST_BUCKET}, received "
                        f"{buckets}"
                    )
            content["graphs"] = {
                precision: {half: Graph(**halves[half]) for half in HALVES}
                for precision, halves in content["graphs"].items()
            }
            return cls(folder=path.parent, **content)
        except OSError as error:
            raise BackendError(f"no exported graphs in {str(folder)!r} ({how}): {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{path} is not a usable manifest ({how}): {error!r}") from error

    def check_model(self, model: FlowPokeTransformer) -> None:
        """BackendError unless the graphs were exported from exactly this model."""
        if (found := model_sha256(model)) != self.model_sha256:
            raise BackendError(
                f"the graphs in {str(self.folder)!r} were exported from another model than "
                f"{model.config.name!r}, {found[:12]}: from {self.model!r}, "
                f"{self.model_sha256[:12]} (sha256 of numbers and weights)"
            )

    def graph(self, precision: str, half: Half) -> Graph:
        """BackendError when it was not exported."""
        if precision not in self.graphs:
            raise BackendError(
                f"{str(self.folder)!r} has no {precision} graphs, only {', '.join(self.graphs)}; "
                "export again with all that are wanted: a new export replaces the old one"
            )
        return self.graphs[precision][half]

    def verified(self, precision: str, half: Half) -> Path:
        """The path of a graph whose contents are as recorded; BackendError otherwise."""
        graph = self.graph(precision, half)
        path = self.folder / graph.file
        if not path.is_file():
            raise BackendError(f"the graph {path} is missing, export again")
        if (found := file_sha256(path)) != graph.sha256:
            raise BackendError(
                f"the graph {path} is damaged, export again: its sha256 is {found}, "
                f"the manifest says {graph.sha256}"
            )
        return path
