# SPDX-License-Identifier: MIT
"""Latency, work and memory of the engine, row by row, on this machine.

    python benchmarks/bench_engine.py --models fpt-tiny fpt-base --compile --baseline

``fpt-base`` is the published architecture with random weights; speed does not depend on them. Each
row tells the floating-point operations of its matrix products and convolutions, the bytes its
operations read and write, and which part of what this machine can do that is: the larger of
operations over the measured matmul rate and bytes over the measured copy rate, over the time.
Operations that stay in a processor's cache can come out above one.

``--compile`` runs the engine with compiled layers as well, ``--returning`` with freed memory going
back to the system (see ``fpt_model.allocator``). ``--baseline`` runs, beside the engine
and in the same run, what one would write first: the plain model under autocast, with nothing kept
but the image's feature map. Memory is a process's peak while it predicts, with libraries and
weights, without what loading them took.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import forget_peak, peak_gb, where
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from fpt_model import FlowPokeTransformer, FlowPredictor, load_model
from fpt_model.allocator import keep_freed_memory
from fpt_model.config import FPT_BASE
from fpt_model.encoder import preprocess
from fpt_model.engine import EncodedImage
from fpt_model.geometry import grid
from fpt_model.model import ImageFeatures, mixture_parameters
from fpt_model.packed import multiply, packed_weight
from fpt_model.predictor import Scene
from fpt_model.processor import mkl_is_slow

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
POKES = 4
BASELINE_STEPS = 8  # of an autoregressive row's steps that the baseline runs, evenly spaced

Shape = tuple[int, ...]


# torch counts the operations that it knows.
@register_flop_formula(torch.ops.fpt_model.linear)
def _linear(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.fpt_model.packed_linear)
def _packed_linear(x: Shape, _handle: Shape, out_features: int, **__: object) -> int:
    return 2 * math.prod(x) * out_features


@register_flop_formula(
    [
        torch.ops.fpt_model.attend_in_parts,
        torch.ops.fpt_model.attend_natively,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    ]
)
def _attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (k[3] + v[3])


@dataclass
class Row:
    """One measurement."""

    model: str
    device: str
    precision: str
    path: str  # "engine", "returning" (with the allocator's defaults), "compiled" or "baseline"
    task: str
    seconds: float  # median of the repetitions
    gflop: float
    gbyte: float
    ceiling: float  # share of this machine's measured ability


# operations whose results are not written, and those whose first argument is not read
_UNWRITTEN, _FILLED = ("empty", "new_empty"), ("copy_", "fill_", "zero_")


class ByteCounter(TorchDispatchMode):
    """Bytes of all tensors that operations read or write; views are free.

    Whole operations arrive in inference mode, so that what only may be a view, as ``reshape``, is
    known by where its result lies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x): x for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        made = {id(x): x for x in _tensors(out)}
        places = {x.untyped_storage().data_ptr() for x in given.values()}
        written = [a.is_write for a in (x.alias_info for x in func._schema.arguments) if a]
        fresh = any(x.untyped_storage().data_ptr() not in places for x in made.values())
        if (fresh or any(written) or not made) and not func.__name__.startswith(_UNWRITTEN):
            filled = (
                (kwargs or {}).get("out"),
                args[:1] if func.__name__.startswith(_FILLED) else (),
            )
            read = given.keys() - {id(x) for x in _tensors(filled)}
            self.total += sum(_bytes(given[key]) for key in read) + sum(map(_bytes, made.values()))
        if func is torch.ops.fpt_model.packed_linear.default:
            own = [x for x in packed_weight(args[1]) if x is not None]
            self.total += sum(x.numel() * x.element_size() for x in own)
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.layout == torch.strided]


def _bytes(x: torch.Tensor) -> int:
    """That it occupies: an expanded tensor's are fewer than its elements'."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str, budget: float) -> float:
    """Median time of a call: after one to warm up, at least three, about ``budget`` seconds; of a
    single one with a budget of 0."""
    call()
    times: list[float] = []
    while len(times) < (3 if budget else 1) or (sum(times) < budget and len(times) < 50):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
        if times[0] > 20:
            break
    return statistics.median(times)


def ceilings(device: str, dtype: torch.dtype, budget: float) -> tuple[float, float]:
    """The best matmul rate in FLOP/s and the copy rate in bytes/s (read and written)."""
    by_onednn = dtype == torch.float32 and device == "cpu" and mkl_is_slow()
    product = partial(multiply, bias=None) if by_onednn else torch.matmul
    rates = []
    for n in (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / seconds(partial(product, a, b), device, budget))
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(rates), 2 * source.numel() / seconds(lambda: target.copy_(source), device, budget)


class Baseline:
    """The model called plainly: every call projects the image again and runs all pokes again."""

    def __init__(self, model: FlowPokeTransformer, device: str, precision: str) -> None:
        self.model = model.to(device).eval()
        self.device, self.precision = device, precision

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def tensor(self, x: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> list[torch.Tensor]:
        with self.autocast():
            return self.model.encoder(preprocess(image, self.model.config).to(self.device))

    @torch.no_grad()
    def predict(self, maps: list[torch.Tensor], pos: Any, flow: Any, queries: Any) -> Any:
        """``pos [B, P, 2]``, ``flow [B, P, D]``, ``queries [Q, 2]``."""
        points = self.tensor(queries).expand(len(pos), -1, -1)
        static = torch.ones(len(pos), dtype=torch.bool, device=self.device)
        with self.autocast():
            features: ImageFeatures = self.model.features(maps)
            raw = self.model.forward_raw(
                features, self.tensor(pos), self.tensor(flow), points, static
            )
        return mixture_parameters(raw, self.model.config)


def tasks(
    model: FlowPokeTransformer, device: str, precision: str, path: str, ar_side: int
) -> dict[str, tuple[Callable[[], object], float]]:
    """For each row a call, and by how much to multiply its time."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    pos, flow = rng.random((64, POKES, 2)), rng.normal(0, 0.05, (64, POKES, 2))
    queries, joint = rng.random((64, 2)), grid((ar_side, ar_side))
    one, some, all_ = (pos[0, :1], flow[0, :1]), (pos[0], flow[0]), (pos, flow)
    calls: dict[str, tuple[Callable[[], object], float]]
    if path != "baseline":
        p = FlowPredictor(
            model,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            compile=path == "compiled",
        )
        scene = p.encode(image)

        def flow_and_mask() -> object:
            own = p.encode(image)
            dense = p.predict(own, *one, grid((64, 64)))
            return dense.reduce("median"), p.influence_of(own, dense, (64, 64))

        def fresh(**kept: Any) -> Scene:
            """Of an image that nothing was asked about, or only what is ``kept``."""
            own = {"features": EncodedImage(scene.features.image), **kept}
            return replace(scene, known={}, unconditional={}, **own)

        asked = fresh()
        p.predict(asked, *one, grid((64, 64)))
        calls = {
            "encode": (lambda: p.encode(image), 1),
            "image to 64 queries": (lambda: p.predict(p.encode(image), *one, queries), 1),
            "image to flow and mask": (flow_and_mask, 1),
            "1 query, 1 poke": (lambda: p.predict(fresh(), *one, queries[:1]), 1),
            "64 queries": (lambda: p.predict(fresh(), *some, queries), 1),
            "dense 64x64": (lambda: p.predict(fresh(), *some, grid((64, 64))), 1),
            "dense 64x64, other pokes": (
                lambda: p.predict(fresh(features=asked.features), *some, grid((64, 64))),
                1,
            ),
            "dense 128x128": (lambda: p.predict(fresh(), *some, grid((128, 128))), 1),
            "64 hypotheses x 64": (lambda: p.predict_batch(scene, *all_, queries), 1),
            f"joint {ar_side}x{ar_side}": (
                lambda: p.sample(scene, *some, joint, num_samples=1),
                1,
            ),
        }
        return calls
    b = Baseline(model, device, precision)
    maps = b.encode(image)
    first = {"encode": (lambda: b.encode(image), 1.0)}
    places = np.linspace(0, len(joint) - 1, BASELINE_STEPS).astype(int)

    def steps() -> None:
        for i in places:
            pokes = np.concatenate([some[0], joint[:i]])[None]
            moved = np.concatenate([some[1], rng.normal(0, 0.05, (i, 2))])[None]
            b.predict(maps, pokes, moved, joint[i : i + 1])

    return (
        first
        | {
            name: (lambda q=q, k=k: b.predict(maps, *k, q), 1.0)
            for name, q, k in (
                ("1 query, 1 poke", queries[:1], [x[None] for x in one]),
                ("64 queries", queries, [x[None] for x in some]),
                ("dense 64x64", grid((64, 64)), [x[None] for x in some]),
                ("dense 128x128", grid((128, 128)), [x[None] for x in some]),
                ("64 hypotheses x 64", queries, all_),
            )
        }
        | {f"joint {ar_side}x{ar_side}": (steps, len(joint) / BASELINE_STEPS)}
    )


def build(name: str) -> FlowPokeTransformer:
    """A shipped model, or fpt-base with random weights."""
    if name == FPT_BASE.name:
        torch.manual_seed(0)
        return FlowPokeTransformer(FPT_BASE)
    return load_model(name)


def measure(job: tuple[str, str, str, str, int, int, bool]) -> tuple[list[Row], float]:
    """All rows of one model, device, precision and path, and the process's peak memory in GB."""
    name, device, precision, path, ar_side, threads, quick = job
    torch.set_num_threads(threads)
    if path != "returning":
        keep_freed_memory()
    flops, copy = ceilings(device, PRECISIONS[precision], 0 if quick else 1)
    rows = []
    calls = tasks(build(name), device, precision, path, ar_side)
    forget_peak()
    budget = 0.0 if quick else 3.0
    timed = {task: seconds(call, device, budget) * factor for task, (call, factor) in calls.items()}
    peak = peak_gb()
    if path == "compiled":  # what is compiled cannot be counted; the work is the same
        calls = tasks(build(name), device, precision, "engine", ar_side)
    for task, (call, factor) in calls.items():
        duration = timed[task]
        with FlopCounterMode(display=False) as counted, ByteCounter() as moved:
            call()
        work, traffic = counted.get_total_flops() * factor, moved.total * factor
        share = max(work / flops, traffic / copy) / duration
        rows.append(
            Row(name, device, precision, path, task, duration, work / 1e9, traffic / 1e9, share)
        )
        print(f"  {name} {precision} {path} {task}: {duration * 1e3:.1f} ms", flush=True)
    return rows, peak


def table(rows: list[Row]) -> str:
    """Markdown; the baseline's rows give ratios in those of the engine."""
    slow = {(r.model, r.precision, r.task): r.seconds for r in rows if r.path == "baseline"}
    lines = [
        "| model | precision | path | task | ms | GFLOP | GB moved | of ceiling | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.path != "baseline":
            base = slow.get((r.model, r.precision, r.task))
            ratio = f"{base / r.seconds:.1f}" if base else "not run"
            lines.append(
                f"| {r.model} | {r.precision} | {r.path} | {r.task} | {r.seconds * 1e3:.1f} "
                f"| {r.gflop:.2f} | {r.gbyte:.2f} | {r.ceiling:.2f} | {ratio} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["fpt-tiny"], help="fpt-base: random weights"
    )
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="run with compiled layers too")
    parser.add_argument(
        "--returning", action="store_true", help="run without keep_freed_memory() too"
    )
    parser.add_argument("--baseline", action="store_true", help="run the plain path beside it")
    parser.add_argument("--joint", type=int, default=32, help="side of the jointly drawn grid")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="each once, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    asked = {"returning": args.returning, "compiled": args.compile, "baseline": args.baseline}
    paths = ["engine", *(path for path, wanted in asked.items() if wanted)]
    rows: list[Row] = []
    memory: dict[str, float] = {}
    for name in args.models:
        for precision in args.precision:
            for path in paths:
                job = (name, args.device, precision, path, args.joint, args.threads, args.quick)
                # a process each, for its peak memory
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found, peak = pool.apply(measure, (job,))
                rows += found
                memory[f"{name} {precision} {path}"] = peak
    run = where(args.threads, torch=torch.__version__)
    print("\n" + ", ".join(f"{k} {v}" for k, v in run.items()) + "\n\n" + table(rows) + "\n")
    for key, value in memory.items():
        print(f"peak memory, {key}: {value:.2f} GiB")
    if args.out:
        report = run | {"rows": [asdict(r) for r in rows], "peak_gb": memory}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
