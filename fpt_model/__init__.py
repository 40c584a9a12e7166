# SPDX-License-Identifier: MIT
"""The Flow Poke Transformer: from an image and a few pokes to distributions over motion."""

from fpt_model.checkpoint import CheckpointError, load_model, save_model
from fpt_model.config import FPT_BASE, FPTConfig
from fpt_model.mixture import FlowMixture
from fpt_model.model import FlowPokeTransformer
from fpt_model.predictor import FlowPredictor, Scene

__all__ = [
    "FPT_BASE",
    "CheckpointError",
    "FPTConfig",
    "FlowMixture",
    "FlowPokeTransformer",
    "FlowPredictor",
    "Scene",
    "load_model",
    "save_model",
]
