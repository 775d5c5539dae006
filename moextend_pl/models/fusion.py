"""Puts image features on the positions that the data reserved for them.

Shapes: B batch, S sequence, D width, I images, P placeholders of one image, T placeholders in all.
"""

from __future__ import annotations

from torch import Tensor

from moextend_pl.contracts import UserError


def scatter_features(embeddings_BSD: Tensor, features_IPD: Tensor, places_T: Tensor) -> Tensor:
    """Overwrites placeholder embeddings with image features, in reading order.

    Args:
        embeddings_BSD: Embedded ids; what stands on placeholders does not matter.
        features_IPD: Projected features of the batch's images, in the order of their placeholders.
        places_T: Places of the placeholders among all B * S, see `contracts.HostFacts`.

    Returns:
        (B, S, D) embeddings; gradients reach the features and the text embeddings.

    Raises:
        UserError: If the numbers of placeholders and features differ.
    """
    features_TD = features_IPD.reshape(-1, embeddings_BSD.shape[-1])
    if len(places_T) != len(features_TD):
        raise UserError(
            f"Expected as many image placeholders as image features, got {len(places_T)} placeholders and "
            f"{len(features_TD)} features of {len(features_IPD)} images. The data must expand each image to the "
            "number of tokens that `sample_spec().tokens_per_image` states."
        )
    # By places and not by a mask, whose gradient waits for a GPU.
    filled = embeddings_BSD.flatten(0, 1).index_copy(0, places_T, features_TD.to(embeddings_BSD.dtype))
    return filled.view_as(embeddings_BSD)
