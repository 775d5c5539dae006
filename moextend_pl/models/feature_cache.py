"""Features of a frozen tower, kept so that each image is encoded once."""

from __future__ import annotations

from torch import Tensor

CACHE_BYTES = 2**30


class FeatureCache:
    """Features by image, up to a number of bytes; what comes later is not kept.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self.size = limit, 0
        self.features: dict[str, Tensor] = {}

    def known(self, keys: list[str]) -> dict[str, Tensor]:
        """Returns what is kept of these images, by image."""
        return {key: self.features[key] for key in keys if key in self.features}

    def remember(self, features: dict[str, Tensor]) -> None:
        """Keeps features (P, C) of images as far as there is room."""
        for key, feature_PC in features.items():
            size = feature_PC.numel() * feature_PC.element_size()
            if self.size + size <= self.limit:
                # A clone: a view would keep the features of its whole company.
                self.features[key] = feature_PC.clone()
                self.size += size

    def clear(self) -> None:
        """Forgets everything."""
        self.features.clear()
        self.size = 0
