"""Where samples come from: shards, order, conversations, batches."""

from __future__ import annotations

from datamodules.image_text import ImageTextShards

__all__ = ["ImageTextShards"]
