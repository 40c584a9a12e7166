# SPDX-License-Identifier: MIT
"""Short training runs that differ in one thing each, and a table of what came of them.

    python benchmarks/ablation.py --data data --steps 2000

trains the variants in ``benchmarks/ablations.yaml`` one after the other, each for as many steps,
with the same seed and so the same images in the same order, and measures each on the split "val"
as ``fpt eval`` does. Held-out kinds, foreign objects and clips are not looked at: choices are made
here. ``benchmarks/ablations.md`` and ``.json`` are written after each variant. Repeated, the
command goes on where it stopped; ``--variants`` takes some, ``--quick`` sees that all runs.

Runs are short, and one seed each: a difference below that of two seeds (``optim.seed=1``) is none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fpt_model.allocator import keep_freed_memory
from training.config import RunConfig
from training.evaluation.report import table
from training.evaluation.run import Evaluation, code_version, load_predictor
from training.evaluation.suite import Suite
from training.tracks import open_shards
from training.train import Trainer

HERE = Path(__file__).parent
QUICK_STEPS = 4
QUICK = ("optim.batch_size=4", "optim.compile=false")

COLUMNS = {
    "parameters": "parameters (M)",
    "cpu_seconds": "CPU seconds",
    "nll": "NLL",
    "epe": "EPE",
    "epe_over_no_motion": "EPE over no motion",
    "epe_random": "EPE, poked anywhere",
    "iou": "IoU, KL",
    "epe_10_over_1": "EPE of the mean at 10 pokes over at 1",
    "best_of_two_over_mean": "two modes over mean",
    "camera_flag": "speed by flag",
}
"""Figures of a row, and their heads in the table."""


@dataclass(frozen=True)
class Variant:
    """What one run changes, and why."""

    name: str
    question: str
    overrides: tuple[str, ...]  # section.key=value

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"\W+", "-", self.name)


def load_variants(path: Path, names: Sequence[str] = ()) -> list[Variant]:
    """Those of a YAML file, or of them the ones named; ValueError names one that is not there."""
    entries: dict[str, Any] = yaml.safe_load(path.read_text())
    if unknown := sorted(set(names) - set(entries)):
        raise ValueError(f"no variant {unknown[0]!r} in {path}: expected of {list(entries)}")
    return [
        Variant(name, entry["question"], tuple(entry["overrides"]))
        for name, entry in entries.items()
        if name in (names or entries)
    ]


def configuration(base: Path, variant: Variant, steps: int, overrides: Sequence[str]) -> RunConfig:
    """The run of a variant: the rate falls in the last quarter; what it changes wins."""
    schedule = (
        f"optim.steps={steps}",
        f"optim.warmup_steps={max(1, min(100, steps // 10))}",
        f"optim.decay_steps={steps // 4}",
        f"optim.checkpoint_every={max(1, steps // 4)}",
        f"optim.validate_every={steps}",
    )
    return RunConfig.load(base, [*schedule, *overrides, *variant.overrides])


def run_variant(
    config: RunConfig, evaluation: Evaluation, data: Path, origin: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Train (or go on), evaluate; the figures of `COLUMNS` and the commit that they were made by.

    They are kept in ``out/figures.json`` and taken from there if run, scenes and the ``origin`` of
    the data are the same.
    """
    kept = out / "figures.json"
    made_by = {"config": config.to_dict(), "scenes": evaluation.suite.scenes, **origin}
    if kept.is_file():
        before = json.loads(kept.read_text())
        if before["made by"] == json.loads(json.dumps(made_by)):
            return before["figures"]
    figures = {"commit": code_version(), **_measure(config, evaluation, data, out)}
    kept.write_text(json.dumps({"made by": made_by, "figures": figures}, indent=1) + "\n")
    return figures


def _measure(config: RunConfig, evaluation: Evaluation, data: Path, out: Path) -> dict[str, Any]:
    trainer = Trainer(config, data, out)
    trainer.run()
    _, splits = evaluation.figures(load_predictor(str(out / "model.safetensors")))
    found = splits["val"]
    largest, curve = found["largest"], found["curve"]

    def optional(name: str, key: str) -> float | None:
        return found[name][key] if name in found else None

    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()) / 1e6,
        "cpu_seconds": round(trainer.cpu_seconds),
        "nll": largest["nll"]["all_tracked"],
        "epe": largest["epe"]["median"],
        "epe_over_no_motion": largest["epe"]["median_over_no_motion"],
        "epe_random": found["random"]["epe"]["median"],
        "iou": largest["iou"]["kl_matched"],
        "epe_10_over_1": curve["10"]["all"]["epe"]["mean"] / curve["1"]["all"]["epe"]["mean"],
        "best_of_two_over_mean": optional("ambiguity", "distinct/best_of_two_over_mean"),
        "camera_flag": optional("camera", "speed_flag_0_over_1"),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table and how it was made."""
    rows = [
        [row["name"], row["question"], *("-" if row[c] is None else row[c] for c in COLUMNS)]
        for row in results["rows"]
    ]
    commits = ", ".join(f"`{c}`" for c in sorted({row["commit"] for row in results["rows"]}))
    best = min(row["epe_over_no_motion"] for row in results["rows"])
    caveat = (
        f"**The best errs {best:.2f} times as much as predicting no motion: so few steps tell how "
        "learning starts, not where it ends.**\n\n"
        if best >= 1
        else ""
    )
    return (
        "# Ablations\n\n"
        f"By `benchmarks/ablation.py`, commit {commits}, {results['date']}, "
        f"{results['machine']}. Each {results['steps']} steps of `{results['config']}`"
        f"{''.join(f' `{o}`' for o in results['overrides'])} with seed {results['seed']} on "
        f"{results['images']} images (generator {results['generator']}), measured on "
        f"{results['scenes']} scenes of `val`.\n\n"
        "EPE: of the median, in cells of a 64 x 64 grid, over all points; poked once, where the "
        "motion is largest if nothing else is said. NLL: of the truth as tracked. *Two modes over "
        "mean*: without pokes, the error of the nearer of the two most probable modes over the "
        "mean's, each distinct future once. *Speed by flag*: expected speed of the still world for "
        "`camera_static` 0 over that for 1. Definitions: `docs/evaluation.md`.\n\n"
        + caveat
        + table(["variant", "question", *COLUMNS.values()], rows)
        + "\nWhat each changes: `overrides` in `benchmarks/ablations.json`.\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="shards of train and val")
    parser.add_argument("--config", type=Path, default=Path("training/configs/tiny.yaml"))
    parser.add_argument("--steps", type=int, default=2000, help="of each run")
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--list", type=Path, default=HERE / "ablations.yaml", help="of variants")
    parser.add_argument("--scenes", type=int, default=250, help="that each is measured on")
    parser.add_argument("--out", type=Path, help="for the runs; default: runs/ablations")
    parser.add_argument("--table", type=Path, help="and .json; default: benchmarks/ablations.md")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps, a few scenes; by default in a temporary folder",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="for all runs"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    steps = QUICK_STEPS if args.quick else args.steps
    if args.variants and not args.quick and not args.table:
        parser.error("--variants would leave these rows alone in the table: give another --table")
    if args.quick:
        elsewhere = Path(tempfile.mkdtemp(prefix="ablations-"))
        runs, written = args.out or elsewhere, args.table or elsewhere / "ablations.md"
    else:
        runs, written = args.out or Path("runs/ablations"), args.table or HERE / "ablations.md"
    overrides = [*(QUICK if args.quick else ()), *args.set]
    variants = load_variants(args.list, args.variants)
    # all of them first: a mistake in the last one is found before the first one is trained
    configs = [configuration(args.config, v, steps, overrides) for v in variants]
    suite = replace(Suite.load("procedural"), splits=("val",), scenes=args.scenes)
    seed = configs[0].optim.seed
    # the same pokes for all variants, and whichever of them are named
    evaluation = Evaluation(suite.quick() if args.quick else suite, args.data, seed=0)
    shards = open_shards(args.data, "train")
    origin = {"images": len(shards), "generator": getattr(shards, "generator", None)}
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        **origin,
        "config": args.config.name,
        "overrides": overrides,
        "steps": steps,
        "seed": seed,
        "scenes": evaluation.suite.scenes,
        "rows": [],
    }
    for variant, config in zip(variants, configs, strict=True):
        figures = run_variant(config, evaluation, args.data, origin, runs / variant.folder)
        results["rows"].append({**asdict(variant), **figures})
        written.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        written.write_text(markdown(results))
    print(written.read_text())


if __name__ == "__main__":
    main()
