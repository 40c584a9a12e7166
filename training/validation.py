# SPDX-License-Identifier: MIT
"""What a run tells of itself while it trains: likelihood and errors, and pictures of scenes.

Both are of the same examples and scenes each time. Figures to report come from
`training.evaluation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

import torch
from lightning_fabric import Fabric
from torch import Tensor

from fpt_model import FlowPokeTransformer, FlowPredictor
from fpt_model.model import mixture_parameters, negative_log_likelihood
from fpt_model.visualize import RGBImage
from training.config import RunConfig
from training.data import Example, ExampleDataset, Shards, load_batches
from training.evaluation.report import Shown, contact_sheet
from training.evaluation.scenes import Scene, scenes
from training.evaluation.suite import Suite
from training.losses import Terms, energy_score, robust, segment_loss
from training.tracks import TrackShards

log = logging.getLogger("training")

Forward = Callable[[Example], tuple[Tensor, Tensor]]
"""A batch to raw outputs ``[B, F, G, n, raw_dim]`` and logits of pairs ``[B, M, M]``."""

EXAMPLES = 256
SEED = 0  # of examples and scenes
BATCH = 32
SCENES = 6  # of the picture
GRID = 32  # cells of each side of a scene

_COUNTS = (0, 1, 2, 5, 10, 100)  # of pokes that are reported, where a run has too many counts
_MAX_COUNTS = 16
_OF_MOTION = ("robust_nll", "energy", "epe", "no_motion_epe")


def reported_counts(visible_pokes: Iterable[int]) -> list[int]:
    """Numbers of pokes to report on: all of a run's or, if it has many, those of the paper."""
    counts = sorted(set(visible_pokes))
    return counts if len(counts) <= _MAX_COUNTS else [c for c in counts if c in _COUNTS]


class Validation:
    """The first `EXAMPLES` validation examples, shared out over the processes, and some scenes."""

    def __init__(self, shards: Shards | TrackShards, config: RunConfig, fabric: Fabric) -> None:
        self.config, self.fabric = config, fabric
        # runs that differ in their seed are compared on the same examples and scenes
        optim = replace(config.optim, seed=SEED)
        clean = replace(config, data=config.data.without_augmentation(), optim=optim)
        mine = range(fabric.global_rank, EXAMPLES, fabric.world_size)
        self.batches = list(load_batches(ExampleDataset(shards, clean), mine, BATCH, workers=0))
        self.counts = reported_counts(config.data.visible_pokes)
        self.visible = torch.tensor(config.data.visible_pokes)
        self.scenes = self._choose_scenes(shards) if fabric.is_global_zero else []

    @property
    def _suite(self) -> Suite:
        """Scenes as evaluation has them, poked once."""
        return Suite(
            name="training",
            title="",
            splits=("val",),
            make="",
            scenes=SCENES,
            grid=GRID,
            pokes=(1,),
            horizon_frames=self.config.data.horizon_frames,
        )

    def _choose_scenes(self, shards: Shards | TrackShards) -> list[Scene]:
        found = list(islice(scenes(shards, self._suite, SEED), SCENES))
        if not found:
            log.warning("no pictures: none of the %d validation samples is a scene", len(shards))
        return found

    @torch.no_grad()
    def figures(self, forward: Forward) -> dict[str, float]:
        """Means over all examples of all processes; each must call it, with the same model."""
        names = ["segments"]
        for count in self.counts:
            names += [f"{name}/{count}_pokes" for name in _OF_MOTION]
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self.fabric.device)
        for batch in self.batches:
            terms = self._terms(forward, self.fabric.to_device(batch))
            totals += torch.stack([torch.stack(terms[name]) for name in names])
        totals = self.fabric.all_reduce(totals, reduce_op="sum")
        means = totals[:, 0] / totals[:, 1].clamp(min=1)
        return dict(zip(names, means.tolist(), strict=True))

    def _terms(self, forward: Forward, batch: Example) -> dict[str, Terms]:
        raw, logits = forward(batch)
        true = batch.query_flow
        nll = robust(negative_log_likelihood(raw, true, self.config.model), self.config)
        log_weights, means, _ = mixture_parameters(raw, self.config.model)
        mean = (log_weights.exp()[..., None] * means).sum(-2)
        values = {
            "robust_nll": nll,
            "energy": energy_score(raw, true, self.config.model),
            "epe": (mean - true)[..., :2].norm(dim=-1),  # in the image alone
            "no_motion_epe": true[..., :2].norm(dim=-1),
        }
        known = ~true.isnan().any(-1)
        terms = {"segments": segment_loss(logits, batch.segment_body)}
        for count in self.counts:
            group = self.visible == count
            for name, value in values.items():
                # a NaN of the model's must not go unnoticed
                terms[f"{name}/{count}_pokes"] = Terms.of(value[:, :, group][known[:, :, group]])
        return terms

    def picture(self, model: FlowPokeTransformer) -> RGBImage | None:
        """Scenes poked where the motion is largest; motion and moving part, true and predicted.

        The part is where the KL divergence is above the model's ``kl_threshold``. None in all
        processes but the first, and where there is no scene.
        """
        if not self.scenes:
            return None
        predictor = FlowPredictor(model, device=str(self.fabric.device))
        shown = []
        for scene in self.scenes:
            encoded = predictor.encode(scene.image)
            free, poked = (
                predictor.predict(
                    encoded,
                    scene.points[pokes],
                    scene.flow[pokes],
                    scene.points,
                    scene.camera_static,
                )
                for pokes in (scene.pokes[:0], scene.pokes[:1])
            )
            flow = poked.marginal(2)  # in the image
            flows = {"mean": flow.mean(), "median": flow.median(), "kl_matched": poked.kl(free)}
            shown.append(Shown(scene, flows))
        return contact_sheet(shown, model.config.kl_threshold, GRID)
