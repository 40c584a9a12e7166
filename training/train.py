# SPDX-License-Identifier: MIT
"""The query-causal trainer.

``python -m training.train --config training/configs/tiny.yaml --data DIR --out RUN`` trains or, if
RUN holds a checkpoint, goes on from it: model, moving average, optimiser, position in the data.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fpt_model import FlowPokeTransformer, load_model, save_model
from fpt_model.layers import sample_maps
from fpt_model.model import mixture_parameters, negative_log_likelihood
from training.config import OptimConfig, RunConfig
from training.data import Example, ExampleDataset, training_batches
from training.pretrained import load_pretrained_encoder
from training.tracks import open_shards

log = logging.getLogger("training")


def learning_rate_factor(step: int, optim: OptimConfig) -> float:
    """Linear warm-up, then the peak, then in the last ``decay_steps`` a cosine to 1 % of it."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    decay = optim.steps - optim.warmup_steps if optim.decay_steps is None else optim.decay_steps
    progress = 1 - (optim.steps - step) / max(1, decay)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def make_optimisers(model: nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """One optimiser for all, or a second for the matrices of transformer blocks.

    Backbone and rest have their own rates; vectors and embeddings no weight decay. Muon's steps
    are scaled to the size of AdamW's, so that one rate serves both (Liu et al., "Muon is scalable
    for LLM training", 2025). The norms' matrices see only two inputs, so their directions are not
    all alike.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = ("layers." in name or "context.blocks." in name) and "norm" not in name
            muon = optim.optimiser == "muon" and p.ndim == 2 and inner
            decay = p.ndim >= 2 and "cond_emb" not in name
            groups.setdefault((muon, "encoder.backbone." in name, decay), []).append(p)

    def options(muon: bool) -> list[dict[str, Any]]:
        rates = {True: optim.encoder_learning_rate, False: optim.learning_rate}
        return [
            {
                "params": params,
                "lr": rates[backbone],
                "peak": rates[backbone],
                "weight_decay": optim.weight_decay if decay else 0.0,
            }
            for (by_muon, backbone, decay), params in groups.items()
            if by_muon == muon
        ]

    adamw = torch.optim.AdamW(options(False), betas=(0.9, 0.99), fused=True)
    if optim.optimiser == "adamw":
        return [adamw]
    return [adamw, torch.optim.Muon(options(True), adjust_lr_fn="match_rms_adamw")]


def start_from(model: FlowPokeTransformer, name: str) -> None:
    """Copy the weights of the shipped model or file ``name`` into ``model`` (in place).

    ``model`` may be larger in two ways: further tensors stay as they were initialised, and further
    inputs of a matrix, which stand last, begin with weight zero. ValueError names what else
    differs.
    """
    source = load_model(name).state_dict()
    own = model.state_dict()
    if missing := sorted(set(source) - set(own)):
        raise ValueError(f"{name} has the tensor {missing[0]!r}, which the run's model has not")
    for key, value in source.items():
        target = own[key]
        if target.shape != value.shape:
            wider = target.ndim == 2 and len(target) == len(value)
            if not wider or target.shape[1] < value.shape[1]:
                raise ValueError(
                    f"{name}: tensor {key!r} has shape {list(value.shape)}, the run's model "
                    f"{list(target.shape)}"
                )
            target.zero_()
            target = target[:, : value.shape[1]]
        target.copy_(value)
    new = sorted(set(own) - set(source))
    log.info("started from %s; %d new tensors %s", name, len(new), new[:5])


def freeze_stages(model: FlowPokeTransformer, stages: int) -> None:
    """Keep the stem and the first ``stages`` stages of a convolutional encoder as they are.

    Their maps are the largest, so not training them saves a third of the encoder's time.
    """
    if stages == 0:
        return
    backbone = model.encoder.backbone
    frozen = ("conv_stem.", "bn1.", *(f"blocks_{i}." for i in range(stages)))
    for prefix in frozen:
        found = [p for name, p in backbone.named_parameters() if name.startswith(prefix)]
        if not found:
            raise ValueError(
                "frozen_encoder_stages needs a flattened EfficientNet as encoder, received "
                f"{model.config.encoder!r}, which has no {prefix}*"
            )
        for parameter in found:
            parameter.requires_grad_(False)


def set_training_mode(model: FlowPokeTransformer) -> None:
    """Train mode, but batch norm keeps the statistics it came with: batches are small."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def robust(nll: Tensor, config: RunConfig) -> Tensor:
    """NLL ``[...]`` under the mixture with an outlier component, uniform over ``[-1, 1]^D``."""
    share = config.optim.outlier_share
    if share == 0:
        return nll
    outlier = math.log(share) - config.model.flow_dim * math.log(2)
    return -torch.logaddexp(math.log1p(-share) - nll, torch.full_like(nll, outlier))


def check_same_run(before: RunConfig, now: RunConfig) -> None:
    """ValueError naming what changed, except for how long to go on and how often to report."""
    free = {"steps", "decay_steps", "checkpoint_every", "validate_every", "compile"}
    old, new = before.to_dict(), now.to_dict()
    changed = [
        f"{section}.{key}: {old[section].get(key)!r} -> {value!r}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section].get(key) != value and not (section == "optim" and key in free)
    ]
    if changed:
        raise ValueError(
            f"the run was started with another configuration ({'; '.join(changed)}): give the same "
            "or choose another --out"
        )


class Learner(nn.Module):
    """The model with the auxiliary task of a run: which points belong to one rigid body.

    Simulation knows the answer for every pixel, motion shows it for what happens to move. Points
    are embedded linearly from the maps that the model's tokens sample, and two belong together the
    more the smaller the angle between their embeddings.
    """

    def __init__(self, model: FlowPokeTransformer, width: int = 32) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Linear(sum(model.encoder.dims), width, bias=False)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, image: Tensor, batch: Example, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Raw head outputs ``[B * F, G, n, raw_dim]`` and logits ``[B, M, M]`` of pairs of points.

        ``image [B, 3, S, S]`` in [-1, 1].
        """
        groups, n = batch.query_pos.shape[2:4]
        features = self.model.encode(image)
        raw = self.model.forward_raw(
            features,
            batch.poke_pos.flatten(0, 1),
            batch.poke_flow.flatten(0, 1),
            batch.query_pos.flatten(0, 1).flatten(1, 2),
            batch.camera_static.flatten(),
            visible.repeat_interleave(n),
        )
        points = sample_maps(
            features.maps, batch.segment_pos, self.model.config.sample_align_corners
        )
        e = F.normalize(self.embedding(points).float(), dim=-1)
        logits = self.scale * (e @ e.transpose(-1, -2)) + self.bias
        return raw.unflatten(1, (groups, n)), logits


def segment_loss(logits: Tensor, body: Tensor) -> Tensor:
    """Binary cross-entropy of pairs ``[B, M, M]`` with at least one point on a body (not static).

    ``body [B, M]`` is the index of the body under a point, 0 for the static world.
    """
    if not body.numel():
        return logits.new_zeros(())
    together = (body[:, :, None] == body[:, None, :]).float()
    counted = ((body > 0)[:, :, None] | (body > 0)[:, None, :]).float()
    loss = F.binary_cross_entropy_with_logits(logits, together, reduction="none")
    return (loss * counted).sum() / counted.sum().clamp(min=1)


class Trainer:
    """One run: owns model, moving average, optimiser and the files in ``out``."""

    def __init__(self, config: RunConfig, data: Path, out: Path) -> None:
        self.config, self.out = config, out
        optim = config.optim
        torch.manual_seed(optim.seed)
        self.model = FlowPokeTransformer(config.model)
        if optim.pretrained_encoder:
            load_pretrained_encoder(self.model)
        elif self.model.encoder.convolutional and not optim.start_from:
            raise ValueError(
                "a convolutional encoder keeps the batch statistics it comes with and so needs "
                "optim.pretrained_encoder = true or optim.start_from, received neither"
            )
        if optim.start_from:
            start_from(self.model, optim.start_from)
        freeze_stages(self.model, optim.frozen_encoder_stages)
        self.learner = Learner(self.model)
        self.forward = torch.compile(self.learner) if optim.compile else self.learner
        self.average = copy.deepcopy(self.learner).eval().requires_grad_(False)
        self.optimisers = make_optimisers(self.learner, optim)
        self.visible = torch.tensor(config.data.visible_pokes)
        self.step = 0
        self.cpu_seconds = 0.0
        self.train_shards = open_shards(data, "train")
        clean = dataclasses.replace(config, data=config.data.without_augmentation())
        validation = ExampleDataset(open_shards(data, "val"), clean)
        self.validation = list(training_batches(validation, 64, 0, 4, workers=0))
        out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.is_file():
            self._resume()
        self.config_file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))

    @property
    def checkpoint(self) -> Path:
        """The file that holds everything needed to go on."""
        return self.out / "last.pt"

    @property
    def config_file(self) -> Path:
        """The run's configuration."""
        return self.out / "config.yaml"

    def _state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
        }

    def _resume(self) -> None:
        check_same_run(RunConfig.load(self.config_file), self.config)
        state = torch.load(self.checkpoint, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.average.load_state_dict(state["average"])
        for optimiser, its in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(its)
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        log.info("resumed %s at step %d", self.checkpoint, self.step)

    def save(self) -> None:
        """Write the checkpoint and the moving average as a model file, each atomically."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(self._state(), partial)
        partial.replace(self.checkpoint)
        save_model(self.average.model, self.out / "model.safetensors", dtype=torch.float16)

    def run(self) -> None:
        """Train to ``optim.steps``."""
        optim = self.config.optim
        dataset = ExampleDataset(self.train_shards, self.config)
        log.info(
            "%d training images, %.2f M parameters (%.2f M trained), steps %d to %d",
            len(self.train_shards),
            sum(p.numel() for p in self.model.parameters()) / 1e6,
            sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6,
            self.step,
            optim.steps,
        )
        set_training_mode(self.model)
        batches = training_batches(dataset, optim.batch_size, self.step, optim.steps)
        with (
            SummaryWriter(str(self.out / "tensorboard")) as writer,
            tqdm(total=optim.steps, initial=self.step, unit="step", smoothing=0.02) as bar,
        ):
            started, running = _cpu_seconds(), None
            for batch in batches:
                loss = torch.tensor(self._train_step(batch))
                running = loss if running is None else 0.98 * running + 0.02 * loss
                self.step += 1
                bar.update()
                bar.set_postfix(nll=f"{running[0]:.3f}", segments=f"{running[1]:.3f}")
                if self.step % 20 == 0:
                    writer.add_scalar("train/nll", running[0], self.step)
                    writer.add_scalar("train/segments", running[1], self.step)
                if self.step % optim.validate_every == 0 or self.step == optim.steps:
                    self._validate(writer)
                if self.step % optim.checkpoint_every == 0 or self.step == optim.steps:
                    now = _cpu_seconds()
                    self.cpu_seconds, started = self.cpu_seconds + now - started, now
                    self.save()

    def _train_step(self, batch: Example) -> tuple[float, float]:
        optim = self.config.optim
        factor = learning_rate_factor(self.step, optim)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
        nll, segments = self._loss(batch)
        loss = nll + optim.segment_weight * segments
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
        self.learner.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), optim.gradient_clip)
        for optimiser in self.optimisers:
            optimiser.step()
        decay = min(optim.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, current in zip(
                self.average.parameters(), self.learner.parameters(), strict=True
            ):
                mean.lerp_(current, 1 - decay)
        return nll.item(), segments.item()

    def _forward(
        self, learner: Callable[..., tuple[Tensor, Tensor]], batch: Example
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs ``[B, F, G, n, raw_dim]`` and logits of pairs ``[B, M, M]``."""
        image = batch.image.float() / 127.5 - 1
        bf16 = self.config.optim.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            raw, logits = learner(image, batch, self.visible)
        return raw.float().unflatten(0, batch.camera_static.shape), logits

    def _loss(self, batch: Example) -> tuple[Tensor, Tensor]:
        """Mean NLL in nats of the supervised queries, and the auxiliary loss."""
        raw, logits = self._forward(self.forward, batch)
        known = ~batch.query_flow.isnan().any(-1)
        nll = negative_log_likelihood(raw[known], batch.query_flow[known], self.config.model)
        return robust(nll, self.config).mean(), segment_loss(logits, batch.segment_body)

    @torch.no_grad()
    def _validate(self, writer: SummaryWriter) -> None:
        """NLL and end-point error by the number of pokes, of the moving average."""
        sums: dict[str, list[Tensor]] = {}
        for batch in self.validation:
            raw, logits = self._forward(self.average, batch)
            sums.setdefault("segments", []).append(segment_loss(logits, batch.segment_body)[None])
            nll = robust(
                negative_log_likelihood(raw, batch.query_flow, self.config.model), self.config
            )
            log_weights, means, _ = mixture_parameters(raw, self.config.model)
            mean = (log_weights.exp()[..., None] * means).sum(-2)
            error = (mean - batch.query_flow).norm(dim=-1)
            still = batch.query_flow.norm(dim=-1)
            for pokes in set(self.config.data.visible_pokes):
                group = self.visible == pokes
                for name, value in (("robust_nll", nll), ("epe", error), ("no_motion_epe", still)):
                    sums.setdefault(f"{name}/{pokes}_pokes", []).append(
                        value[:, :, group].flatten()
                    )
        figures = {key: torch.cat(values).nanmean().item() for key, values in sums.items()}
        for key, value in figures.items():
            writer.add_scalar(f"val_{key}", value, self.step)
        with (self.out / "validation.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "time": time.time(), **figures}) + "\n")


def _cpu_seconds() -> float:
    """CPU time of this process (all threads); data workers are not counted."""
    t = os.times()
    return t.user + t.system


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file, see training/configs"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the shards of sim.dataset"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. optim.steps=100")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Trainer(RunConfig.load(args.config, args.overrides), args.data, args.out).run()


if __name__ == "__main__":
    main()
