"""Puts image features on the positions that the data reserved for them.

Shapes: B batch, S sequence, D width, I images, P placeholders of one image.
"""

from __future__ import annotations

from torch import Tensor

from moextend_pl.contracts import UserError


def scatter_features(
    embeddings_BSD: Tensor, features_IPD: Tensor, is_image_BS: Tensor, places: int | None = None
) -> Tensor:
    """Overwrites placeholder embeddings with image features, in reading order.

    Args:
        embeddings_BSD: Embedded ids; what stands on placeholders does not matter.
        features_IPD: Projected features of the batch's images, in the order of their placeholders.
        is_image_BS: True on placeholders; I * P positions in all.
        places: Their number; counted here if None, for which a GPU has to be waited for.

    Returns:
        (B, S, D) embeddings; gradients reach the features and the text embeddings.

    Raises:
        UserError: If the numbers of placeholders and features differ.
    """
    features_TD = features_IPD.reshape(-1, embeddings_BSD.shape[-1])
    places = int(is_image_BS.sum()) if places is None else places
    if places != len(features_TD):
        raise UserError(
            f"Expected as many image placeholders as image features, got {places} placeholders and "
            f"{len(features_TD)} features of {len(features_IPD)} images. The data must expand each image to the "
            "number of tokens that `sample_spec().tokens_per_image` states."
        )
    mask = is_image_BS.unsqueeze(-1).expand_as(embeddings_BSD)
    return embeddings_BSD.masked_scatter(mask, features_TD.to(embeddings_BSD.dtype))
