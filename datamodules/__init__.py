"""Where samples come from: shards, order, conversations, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.image_text import ImageTextShards

__all__ = ["ImageTextShards"]


def __getattr__(name: str) -> Any:
    """Imports the data module on first use, so that tools which need no training start without torch."""
    if name != "ImageTextShards":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from datamodules.image_text import ImageTextShards

    return ImageTextShards
