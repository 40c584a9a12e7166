# SPDX-License-Identifier: MIT
"""The Flow Poke Transformer: from an image and a few pokes to distributions over motion.

Geometry, configuration and mixtures need numpy only; torch, which takes seconds to import, is
loaded when one of the names that need it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fpt_model.config import FPT_BASE, FPTConfig
from fpt_model.mixture import FlowMixture

if TYPE_CHECKING:
    from fpt_model.checkpoint import CheckpointError, load_model, save_model
    from fpt_model.engine import BackendError
    from fpt_model.model import FlowPokeTransformer
    from fpt_model.predictor import FlowPredictor, Scene

__all__ = [
    "FPT_BASE",
    "BackendError",
    "CheckpointError",
    "FPTConfig",
    "FlowMixture",
    "FlowPokeTransformer",
    "FlowPredictor",
    "Scene",
    "load_model",
    "save_model",
]

_MODULES_WITH_TORCH = {
    "BackendError": "engine",
    "CheckpointError": "checkpoint",
    "FlowPokeTransformer": "model",
    "FlowPredictor": "predictor",
    "Scene": "predictor",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES_WITH_TORCH:
        return getattr(import_module(f"fpt_model.{_MODULES_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'fpt_model' has no attribute {name!r}")
