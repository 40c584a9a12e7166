# SPDX-License-Identifier: MIT
"""ONNX Runtime beside PyTorch on this machine, in one run.

    python benchmarks/bench_backends.py --model fpt-tiny --precision fp32 int8

Both sides take turns at each task, so that what else the machine does meets both; a row gives the
medians and their ratio. PyTorch runs in fp32, ONNX Runtime in each ``--precision``. Without
``--graphs`` the model is exported to a temporary folder first. ``fpt-base`` is the published
architecture with random weights; speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from bench_engine import build
from report import where

from fpt_model import FlowPokeTransformer, FlowPredictor
from fpt_model.allocator import keep_freed_memory
from fpt_model.export import export
from fpt_model.geometry import grid

POKES = 4
# Both sides' idle threads spin for a while and would take the cores from the other, which made
# PyTorch's encoding look twice as slow: so each side rests, warms up, and then runs some times.
REST_S = 0.2
RUNS = 5


@dataclass
class Row:
    """One measurement."""

    task: str
    precision: str  # of ONNX Runtime
    providers: str  # that it really ran on
    torch_ms: float  # medians
    onnxruntime_ms: float
    repetitions: int

    @property
    def ratio(self) -> float:
        """How many times faster ONNX Runtime is."""
        return self.torch_ms / self.onnxruntime_ms


def in_turns(
    calls: tuple[Callable[[], object], ...], budget_s: float
) -> tuple[tuple[float, ...], int]:
    """Median time of each call in ms, and how often each ran: at least thrice ``RUNS`` times."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget_s
    while len(times[0]) < 3 * RUNS or (time.perf_counter() < end and len(times[0]) < 200):
        for call, taken in zip(calls, times, strict=True):
            time.sleep(REST_S)
            call()
            for _ in range(RUNS):
                start = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - start))
    return tuple(statistics.median(taken) for taken in times), len(times[0])


def tasks(predictor: FlowPredictor) -> dict[str, Callable[[], object]]:
    """What is measured, by name; no call profits from the pokes of the one before."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    pos, flow = rng.random((POKES, 2)), rng.normal(0, 0.05, (POKES, predictor.config.flow_dim))
    scene = predictor.encode(image)

    def predict(queries: np.ndarray) -> Callable[[], object]:
        def call() -> object:
            scene.known.clear()
            return predictor.predict(scene, pos, flow, queries)

        return call

    return {
        "encode": lambda: predictor.encode(image),
        "64 queries": predict(rng.random((64, 2))),
        "dense 64x64": predict(grid((64, 64))),
    }


def measure(
    model: FlowPokeTransformer,
    graphs: Path,
    precisions: list[str],
    providers: list[str],
    budget_s: float,
) -> list[Row]:
    """All rows."""
    reference, rows = tasks(FlowPredictor(model)), []
    for precision in precisions:
        own = FlowPredictor(
            model,
            "onnxruntime",
            precision=precision,  # type: ignore[arg-type]
            graphs=graphs,
            providers=providers,
            strict=True,
        )
        for task, call in tasks(own).items():
            (theirs, ours), repetitions = in_turns((reference[task], call), budget_s)
            rows.append(Row(task, precision, ",".join(own.providers), theirs, ours, repetitions))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| task | precision | providers | PyTorch fp32, ms | ONNX Runtime, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.task} | {r.precision} | {r.providers} | {r.torch_ms:.1f} "
            f"| {r.onnxruntime_ms:.1f} | {r.ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fpt-tiny", help="fpt-base: random weights")
    parser.add_argument("--graphs", type=Path, help="a folder that fpt export wrote from it")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--providers", default="cpu", help="such as tensorrt,cuda,cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    model = build(args.model)
    with tempfile.TemporaryDirectory() as folder:
        graphs = args.graphs or export(model, Path(folder), args.precision).folder
        rows = measure(model, graphs, args.precision, args.providers.split(","), args.seconds)
    run = where(
        args.threads,
        model=args.model,
        torch=torch.__version__,
        onnxruntime=onnxruntime.__version__,
    )
    print(", ".join(f"{k} {v}" for k, v in run.items()) + "\n\n" + table(rows))
    if args.out:
        content = run | {"rows": [asdict(r) | {"ratio": r.ratio} for r in rows]}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
