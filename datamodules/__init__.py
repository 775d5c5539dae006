"""Where samples come from: shards, order, conversations, batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.image_text import ImageTextShards
    from datamodules.pipeline import OwnPipeline

__all__ = ["ImageTextShards", "OwnPipeline"]

_HOMES = {"ImageTextShards": "image_text", "OwnPipeline": "pipeline"}


def __getattr__(name: str) -> Any:
    """Imports a data module on first use, so that tools which need no training start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"datamodules.{_HOMES[name]}"), name)
