"""Features of a frozen tower, kept so that each image is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CACHE_BYTES = 2**30
ENCODE_TOGETHER = 16


@torch.no_grad()
def encode_alike(encode: Callable[[Tensor], Tensor], pixels_I3HW: Tensor, chosen: Sequence[int]) -> list[Tensor]:
    """Encodes some images of a batch, always the same number at a time.

    The last bit of a convolution may depend on it, and a resumed run, which meets the images in other company, has to
    see the same features.

    Args:
        encode: From images to features (., P, C).
        pixels_I3HW: Normalised images.
        chosen: Which of them.

    Returns:
        Features (P, C) of each.
    """
    features: list[Tensor] = []
    for first in range(0, len(chosen), ENCODE_TOGETHER):
        some = chosen[first : first + ENCODE_TOGETHER]
        padded = pixels_I3HW.new_zeros(ENCODE_TOGETHER, *pixels_I3HW.shape[1:])
        padded[: len(some)] = torch.stack([pixels_I3HW[n] for n in some])  # a list as index waits
        features.extend(encode(padded)[: len(some)].unbind())
    return features


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


def encode_once(
    encode: Callable[[Tensor], Tensor], pixels_I3HW: Tensor, keys: Sequence[str], cache: FeatureCache, keep: bool
) -> Tensor:
    """Returns the features (I, P, C) of images; those that are known are not encoded again.

    Args:
        encode: From images to features (., P, C).
        pixels_I3HW: Normalised images.
        keys: Their names.
        cache: What is known.
        keep: Whether to remember the others there.
    """
    known = cache.known(list(keys))
    missing = [n for n, key in enumerate(keys) if key not in known]
    known.update(zip([keys[n] for n in missing], encode_alike(encode, pixels_I3HW, missing), strict=True))
    if keep:
        cache.remember({key: known[key] for key in (keys[n] for n in missing)})
    return torch.stack([known[key] for key in keys])
