# SPDX-License-Identifier: MIT
"""fpt-base beside the authors' code: time, memory, and that both say the same.

    git clone https://github.com/CompVis/flow-poke-transformer public
    python benchmarks/bench_public.py --checkout public --threads 2

Nothing of it is part of this repository, nor installed with it: einops and jaxtyping, which it
needs, must be importable. Both sides get the same random weights, from a file of the published
layout, and the same 448 x 448 image; each runs in a process of its own, one after the other. No
weight is left at the zeros that training begins with, where pokes and half of each layer do
nothing. Encoding is ours with the keys and values of all layers, which the public code computes in
every query. Answers are compared with the public code's fp32. ``--keep`` lets all
sides keep freed memory as ours compiled does, see ``fpt_model.allocator``. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from report import forget_peak, medians, peak_gb, where

SIDE = 448
CELLS = (64, 64)
POKES = 4
JOINT_STEPS = 32
SIDES = {  # name: ours or (None) the public code, precision, compiled
    "public fp32": (None, "fp32", False),
    "public bf16 autocast": (None, "bf16", False),
    "ours fp32": ("ours", "fp32", False),
    "ours fp32 compiled": ("ours", "fp32", True),
    "ours bf16": ("ours", "bf16", False),
    "ours bf16 compiled": ("ours", "bf16", True),
}


class Model(NamedTuple):
    """What is measured of a side. Motions and points are ``[N, 2]``, normalised."""

    encode: Callable[[], Any]
    predict: Callable[..., NDArray[np.float64]]  # scene, pokes' points, motions, queries -> means
    sample: Callable[..., Any]  # the same, one after the other


def inputs() -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]:
    """The image and the pokes, points and motions."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return image, rng.random((POKES, 2)), rng.normal(0, 0.05, (POKES, 2))


def public_code(checkout: Path) -> Any:
    """Their model, its weights as they are drawn."""
    sys.path.insert(0, str(checkout))
    warnings.filterwarnings("ignore")
    import flow_poke.dinov2
    import hubconf

    # Else it would fetch DINOv2's weights, which are replaced anyway.
    torch.hub.load = lambda *_, **__: flow_poke.dinov2.vit_base_reg()  # type: ignore[assignment]
    torch.manual_seed(0)
    return hubconf.fpt_base(pretrained=False)


def public(checkout: Path, weights: Path, precision: str) -> Model:
    model = public_code(checkout)
    model.load_state_dict(torch.load(weights, map_location="cpu", mmap=True)["model"])
    if precision == "fp32":
        for layer in model.transformer.layers:
            layer.kv_cache.float()  # it is made for bfloat16
    x = torch.from_numpy(inputs()[0]).permute(2, 0, 1)[None] / 127.5 - 1

    def tensors(*arrays: NDArray[np.float64]) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(a.astype(np.float32))[None] for a in arrays)

    def run(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any) -> Any:
            with (
                torch.inference_mode(),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            ):
                return call(*args)

        return inner

    def predict(scene: Any, *points: NDArray[np.float64]) -> NDArray[np.float64]:
        return model.predict_parallel(*tensors(*points), True, scene).mean[0].double().numpy()

    def sample(scene: Any, *points: NDArray[np.float64]) -> Any:
        return model.predict_autoregressive(*tensors(*points), True, scene, verbose=False)

    return Model(run(lambda: model.embed_image(x)), run(predict), run(sample))


def ours(weights: Path, precision: Any, compiled: bool) -> Model:
    from fpt_model import FlowPredictor

    predictor = FlowPredictor.load(str(weights), precision=precision, compile=compiled)
    image = inputs()[0]
    return Model(
        lambda: predictor.encode(image),
        lambda *args: predictor.predict(*args).mean(),
        lambda *args: predictor.sample(*args, num_samples=1, seed=0),
    )


def milliseconds(call: Callable[[], Any], times: int) -> float:
    """The median."""
    return 1e3 * medians({"": call}, times)[""]


def measure(
    job: tuple[str, Path, Path, int, bool, bool],
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Rows of one side, and its mean motions on the grid."""
    from fpt_model.allocator import keep_freed_memory
    from fpt_model.geometry import grid

    name, checkout, weights, threads, quick, keep = job
    torch.set_num_threads(threads)
    own, precision, compiled = SIDES[name]
    if keep or compiled:
        keep_freed_memory()
    forget_peak()
    model = ours(weights, precision, compiled) if own else public(checkout, weights, precision)
    rows = {"loading, peak GiB": peak_gb()}
    forget_peak()
    _, points, motions = inputs()
    cells = grid(CELLS)
    scene = model.encode()
    fresh = iter(np.random.default_rng(1).random((10_000, 2, 1, 2)))  # pokes not asked before

    def one_query() -> None:
        point, query = next(fresh)
        model.predict(scene, point, motions[:1], query)

    few = 1 if quick else 5
    rows["encode, ms"] = milliseconds(model.encode, few)
    rows["1 query, 1 poke, ms"] = milliseconds(one_query, 3 * few)
    rows["dense 64 x 64, ms"] = milliseconds(
        lambda: model.predict(scene, points, motions, cells), few
    )
    steps = cells[: 4 if quick else JOINT_STEPS]
    rows["joint, ms a step"] = milliseconds(
        lambda: model.sample(scene, points, motions, steps), 1
    ) / len(steps)
    rows["answering, peak GiB"] = peak_gb()
    rows["all of it, peak GiB"] = max(rows["loading, peak GiB"], rows["answering, peak GiB"])
    return rows, model.predict(scene, points, motions, cells)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="of the public code")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="freed memory, on all sides")
    parser.add_argument("--quick", action="store_true", help="each once, to see that it runs")
    args = parser.parse_args()
    found = {}
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "flow_poke_open_set_base.pt"
        with processes.Pool(1) as pool:
            pool.apply(save_random_weights, (args.checkout, weights))
        for name in dict.fromkeys(["public fp32", *args.sides]):
            job = (name, args.checkout, weights, args.threads, args.quick, args.keep)
            with processes.Pool(1) as pool:  # a process each, for its peak memory
                found[name] = pool.apply(measure, (job,))
            print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found[name][0].items()))
    reference, expected = found["public fp32"]
    run = where(args.threads, torch=torch.__version__)
    print("\n" + ", ".join(f"{k} {v}" for k, v in run.items()) + "\n")
    print("| | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for row, slow in reference.items():
        cells = [f"{rows[row]:.4g} ({slow / rows[row]:.2g})" for rows, _ in found.values()]
        print(f"| {row} | " + " | ".join(cells) + " |")
    apart = [f"{np.abs(means - expected).max():.1e}" for _, means in found.values()]
    largest = f"mean motions of up to {np.abs(expected).max():.1e}, largest difference"
    print(f"| {largest} | " + " | ".join(apart) + " |")
    print("\nIn brackets: how many times less than public fp32.")


def save_random_weights(checkout: Path, out: Path) -> None:
    model = public_code(checkout)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    torch.save({"model": model.state_dict()}, out)


if __name__ == "__main__":
    main()
