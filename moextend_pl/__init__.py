"""Gives a trusted mixture-of-experts language model new senses without it losing what it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moextend_pl.encoder import VisionEncoder
    from moextend_pl.language import MoELanguageModel
    from moextend_pl.module import MoExtend
    from moextend_pl.projector import Projector

__version__ = "0.1.0"
__all__ = ["MoELanguageModel", "MoExtend", "Projector", "VisionEncoder"]

_HOME = {"MoELanguageModel": "language", "MoExtend": "module", "Projector": "projector", "VisionEncoder": "encoder"}


def __getattr__(name: str) -> Any:
    # The models import torch and transformers, which takes seconds that `--help` should not.
    if name not in _HOME:
        raise AttributeError(f"module 'moextend_pl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"moextend_pl.{_HOME[name]}"), name)
