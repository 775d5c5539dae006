"""Image features land on their own placeholders."""

from __future__ import annotations

import pytest
import torch

from moextend_pl.contracts import UserError
from moextend_pl.models.fusion import scatter_features

IS_IMAGE = torch.tensor(
    [
        [0, 1, 1, 0, 1, 1, 0],  # two images in one sequence
        [0, 0, 0, 0, 0, 0, 0],  # none
        [0, 0, 0, 1, 1, 0, 0],
    ]
).bool()
PLACES = IS_IMAGE.flatten().nonzero().squeeze(-1)


def test_each_image_lands_on_its_own_placeholders_in_reading_order() -> None:
    text = -torch.arange(3 * 7).reshape(3, 7, 1).expand(-1, -1, 4).float()
    # Image i, token p, channel d is 100 i + 10 p + d: every number stands once.
    features = torch.tensor([[[100 * i + 10 * p + d for d in range(4)] for p in range(2)] for i in range(3)]).float()
    got = scatter_features(text, features, PLACES)
    wanted = {(0, 1): (0, 0), (0, 2): (0, 1), (0, 4): (1, 0), (0, 5): (1, 1), (2, 3): (2, 0), (2, 4): (2, 1)}
    for sequence in range(3):
        for place in range(7):
            image = wanted.get((sequence, place))
            expected = text[sequence, place] if image is None else features[image]
            assert got[sequence, place].tolist() == expected.tolist()


def test_gradients_reach_features_and_text_and_nothing_under_placeholders() -> None:
    text, features = torch.randn(3, 7, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    weight = torch.rand(3, 7, 4) + 1
    (scatter_features(text, features, PLACES) * weight).sum().backward()
    assert torch.equal(features.grad.reshape(-1, 4), weight[IS_IMAGE])
    assert torch.equal(text.grad, weight * ~IS_IMAGE[..., None])


def test_inputs_are_left_as_they_are() -> None:
    text = torch.zeros(3, 7, 4)
    scatter_features(text, torch.ones(3, 2, 4), PLACES)
    assert not text.any()


def test_features_take_the_type_of_the_embeddings() -> None:
    assert scatter_features(torch.zeros(3, 7, 4).bfloat16(), torch.ones(3, 2, 4), PLACES).dtype == torch.bfloat16


@pytest.mark.parametrize("images", [2, 4])
def test_other_number_of_features_than_placeholders_is_refused(images: int) -> None:
    with pytest.raises(UserError, match=f"got 6 placeholders and {2 * images} features of {images} images"):
        scatter_features(torch.zeros(3, 7, 4), torch.ones(images, 2, 4), PLACES)
