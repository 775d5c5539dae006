"""From the features of a tower to the positions that the data reserved for them.

Shapes: B batch, S sequence, D width, I images, P tokens of one image, C channels of the tower, T placeholders in all.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from moextend_pl.contracts import UserError


def merge_neighbours(features_IPC: Tensor, side: int) -> Tensor:
    """Joins each square of neighbouring tokens into one token with all their channels (pixel shuffle).

    Args:
        features_IPC: Features of square grids, row by row; the grid's side is a multiple of `side`.
        side: Side of the squares, s.

    Returns:
        (I, P / s^2, C * s^2).
    """
    images, tokens, channels = features_IPC.shape
    grid = math.isqrt(tokens)
    squares = features_IPC.reshape(images, grid // side, side, grid // side, side, channels)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(images, tokens // side**2, channels * side**2)


def dense_layers(narrow: int, wide: int, depth: int) -> nn.Sequential:
    """Returns the linear maps of a projector, with GELU between them.

    Args:
        narrow: Width of what comes in.
        wide: Width behind each map.
        depth: Number of maps.
    """
    layers: list[nn.Module] = []
    for n, (into, out) in enumerate(itertools.pairwise([narrow] + [wide] * depth)):
        layers += [nn.GELU()] * (n > 0) + [nn.Linear(into, out)]
    return nn.Sequential(*layers)


def standing_features(features_NPD: Tensor, tiles_BS: Tensor, places_T: Tensor) -> Tensor:
    """Returns the features of those images that have placeholders, in the order of these: thumbnails (NVLM-H).

    Args:
        features_NPD: Projected features of all images.
        tiles_BS: Which image each placeholder stands for, from 1.
        places_T: As of `scatter_features`.
    """
    first_of_each = places_T[:: features_NPD.shape[1]]
    return features_NPD.index_select(0, tiles_BS.flatten().index_select(0, first_of_each) - 1)


def scatter_features(embeddings_BSD: Tensor, features_IPD: Tensor, places_T: Tensor, kind: str = "image") -> Tensor:
    """Overwrites placeholder embeddings with features of images or sounds, in reading order.

    Args:
        embeddings_BSD: Embedded ids; what stands on placeholders does not matter.
        features_IPD: Projected features of the batch's images, in the order of their placeholders.
        places_T: Places of the placeholders among all B * S, see `contracts.HostFacts`.
        kind: What they are of.

    Returns:
        (B, S, D) embeddings; gradients reach the features and the text embeddings.

    Raises:
        UserError: If the numbers of placeholders and features differ.
    """
    features_TD = features_IPD.reshape(-1, embeddings_BSD.shape[-1])
    if len(places_T) != len(features_TD):
        raise UserError(
            f"Expected as many {kind} placeholders as {kind} features, got {len(places_T)} placeholders and "
            f"{len(features_TD)} features of {len(features_IPD)} {kind}s. The data must expand each {kind} to the "
            f"number of tokens that `sample_spec().tokens_per_{kind}` states."
        )
    # By places and not by a mask, whose gradient waits for a GPU.
    filled = embeddings_BSD.flatten(0, 1).index_copy(0, places_T, features_TD.to(embeddings_BSD.dtype))
    return filled.view_as(embeddings_BSD)
