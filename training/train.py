# SPDX-License-Identifier: MIT
"""The query-causal trainer.

``python -m training.train --config training/configs/tiny.yaml --data DIR --out RUN`` trains or, if
RUN holds a checkpoint, goes on from it: model, moving average, optimiser, position in the data.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fpt_model import FlowPokeTransformer, save_model
from fpt_model.model import mixture_parameters, negative_log_likelihood
from training.config import OptimConfig, RunConfig
from training.data import Example, ExampleDataset, Shards, training_batches
from training.pretrained import load_pretrained_encoder

log = logging.getLogger("training")


def learning_rate_factor(step: int, optim: OptimConfig) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: FlowPokeTransformer, optim: OptimConfig) -> list[dict[str, Any]]:
    """Encoder and rest with their own rates; no weight decay on vectors and embeddings."""
    groups = []
    for encoder in (True, False):
        for decay in (True, False):
            params = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad
                and name.startswith("encoder.") == encoder
                and (p.ndim >= 2 and "cond_emb" not in name) == decay
            ]
            rate = optim.encoder_learning_rate if encoder else optim.learning_rate
            groups.append(
                {
                    "params": params,
                    "lr": rate,
                    "peak": rate,
                    "weight_decay": optim.weight_decay if decay else 0.0,
                }
            )
    return [g for g in groups if g["params"]]


def freeze_stages(model: FlowPokeTransformer, stages: int) -> None:
    """Keep the stem and the first ``stages`` stages of a convolutional encoder as they are.

    Their maps are the largest, so not training them saves a third of the encoder's time.
    """
    if stages == 0:
        return
    backbone = model.encoder.backbone
    for module in (backbone.conv_stem, backbone.bn1, *backbone.blocks[:stages]):
        module.requires_grad_(False)


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


class Trainer:
    """One run: owns model, moving average, optimiser and the files in ``out``."""

    def __init__(self, config: RunConfig, data: Path, out: Path) -> None:
        self.config, self.out = config, out
        optim = config.optim
        torch.manual_seed(optim.seed)
        random.seed(optim.seed)
        self.model = FlowPokeTransformer(config.model)
        if optim.pretrained_encoder:
            load_pretrained_encoder(self.model)
        freeze_stages(self.model, optim.frozen_encoder_stages)
        self.forward = torch.compile(self.model) if optim.compile else self.model
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.model, optim), betas=(0.9, 0.99))
        self.visible = torch.tensor(config.data.visible_pokes)
        self.step = 0
        self.cpu_seconds = 0.0
        self.train_shards = Shards(data, "train")
        validation = ExampleDataset(Shards(data, "val"), config)
        self.validation = list(training_batches(validation, 64, 0, 4, workers=0))
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        if self.checkpoint.is_file():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        """The file that holds everything needed to go on."""
        return self.out / "last.pt"

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
        }

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        log.info("resumed %s at step %d", self.checkpoint, self.step)

    def save(self) -> None:
        """Write the checkpoint and the moving average as a model file, each atomically."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(self._state(), partial)
        partial.replace(self.checkpoint)
        save_model(self.average, self.out / "model.safetensors", dtype=torch.float16)

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
                loss = self._train_step(batch)
                running = loss if running is None else 0.98 * running + 0.02 * loss
                self.step += 1
                bar.update()
                bar.set_postfix(nll=f"{running:.3f}")
                if self.step % 20 == 0:
                    writer.add_scalar("train/nll", running, self.step)
                if self.step % optim.validate_every == 0 or self.step == optim.steps:
                    self._validate(writer)
                if self.step % optim.checkpoint_every == 0 or self.step == optim.steps:
                    now = _cpu_seconds()
                    self.cpu_seconds, started = self.cpu_seconds + now - started, now
                    self.save()

    def _train_step(self, batch: Example) -> float:
        optim = self.config.optim
        factor = learning_rate_factor(self.step, optim)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), optim.gradient_clip)
        self.optimiser.step()
        decay = min(optim.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, current in zip(
                self.average.parameters(), self.model.parameters(), strict=True
            ):
                mean.lerp_(current, 1 - decay)
        return loss.item()

    def _forward(self, model: Callable[..., Tensor], batch: Example) -> Tensor:
        image = batch.image.float() / 127.5 - 1
        bf16 = self.config.optim.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(
                image,
                batch.poke_pos,
                batch.poke_flow,
                batch.query_pos,
                batch.camera_static,
                self.visible,
            ).float()

    def _loss(self, batch: Example) -> Tensor:
        """Mean NLL in nats of the supervised queries."""
        raw = self._forward(self.forward, batch)
        known = ~batch.query_flow.isnan().any(-1)
        nll = negative_log_likelihood(raw[known], batch.query_flow[known], self.config.model)
        return robust(nll, self.config).mean()

    @torch.no_grad()
    def _validate(self, writer: SummaryWriter) -> None:
        """NLL and end-point error by the number of pokes, of the moving average."""
        sums: dict[str, list[Tensor]] = {}
        for batch in self.validation:
            raw = self._forward(self.average, batch)
            nll = robust(
                negative_log_likelihood(raw, batch.query_flow, self.config.model), self.config
            )
            log_weights, means, _ = mixture_parameters(raw, self.config.model)
            mean = (log_weights.exp()[..., None] * means).sum(-2)
            error = (mean - batch.query_flow).norm(dim=-1)
            still = batch.query_flow.norm(dim=-1)
            for pokes in set(self.config.data.visible_pokes):
                group = self.visible == pokes
                for name, value in (("nll", nll), ("epe", error), ("no_motion_epe", still)):
                    sums.setdefault(f"{name}/{pokes}_pokes", []).append(value[:, group].flatten())
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
