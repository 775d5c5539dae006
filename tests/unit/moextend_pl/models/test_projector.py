"""The projector's kinds and its pixel shuffle."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moextend_pl.contracts import UserError
from moextend_pl.models.fusion import merge_neighbours
from moextend_pl.models.projector import Projector


def test_merged_tokens_hold_the_channels_of_their_square() -> None:
    images, side, channels = 2, 6, 3
    features = torch.randn(images, side * side, channels)
    for square in (1, 2, 3):
        merged = merge_neighbours(features, square)
        grid = side // square
        assert merged.shape == (images, grid * grid, channels * square * square)
        for image in range(images):
            for row in range(grid):
                for column in range(grid):
                    expected = [
                        features[image, (row * square + y) * side + column * square + x]
                        for y in range(square)
                        for x in range(square)
                    ]
                    assert torch.equal(merged[image, row * grid + column], torch.cat(expected))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("linear", ["Linear"]),
        ("mlp1x_gelu", ["Linear"]),
        ("mlp2x_gelu", ["Linear", "GELU", "Linear"]),
        ("mlp3x_gelu", ["Linear", "GELU", "Linear", "GELU", "Linear"]),
    ],
)
def test_kind_decides_the_layers(kind: str, layers: list[str]) -> None:
    projector = Projector(kind, in_features=6, out_features=10)
    projector.configure_model()
    assert [type(layer).__name__ for layer in projector.layers] == layers
    linear = [layer for layer in projector.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(6, 10)] + [(10, 10)] * (len(linear) - 1)
    x = torch.randn(2, 4, 6)
    expected = x
    for number, layer in enumerate(linear):
        expected = F.linear(F.gelu(expected) if number else expected, layer.weight, layer.bias)
    torch.testing.assert_close(projector(x), expected)


def test_merge_widens_the_first_layer_and_takes_away_tokens() -> None:
    projector = Projector("linear", merge=2, in_features=5, out_features=7)
    projector.configure_model()
    features = torch.randn(3, 16, 5)
    assert projector.tokens_per_image(16) == 4
    expected = F.linear(merge_neighbours(features, 2), projector.layers[0].weight, projector.layers[0].bias)
    assert torch.equal(projector(features), expected)


@pytest.mark.parametrize(("tokens", "merge"), [(12, 1), (9, 2), (15, 3)])
def test_grid_that_does_not_divide_is_refused(tokens: int, merge: int) -> None:
    with pytest.raises(UserError, match=f"got {tokens} tokens an image"):
        Projector("linear", merge=merge).tokens_per_image(tokens)


@pytest.mark.parametrize("kind", ["mlp", "mlp0x_gelu", "mlp10x_gelu", "linear2", "Linear"])
def test_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"got '{kind}'"):
        Projector(kind)


def test_projector_alone_needs_its_widths() -> None:
    with pytest.raises(UserError, match="got None and 4"):
        Projector("linear", out_features=4).configure_model()


def test_initial_weights_depend_on_nothing_drawn_before() -> None:
    weights = []
    for _ in range(2):
        torch.randn(3)
        projector = Projector("linear", in_features=2, out_features=3)
        projector.configure_model()
        weights.append(projector.layers[0].weight)
    assert torch.equal(*weights)


def test_building_leaves_the_random_numbers_of_the_run_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    Projector("linear", in_features=2, out_features=3).configure_model()
    assert torch.equal(torch.randn(3), expected)


def test_projector_alone_learns_pairs_of_tensors() -> None:
    projector = Projector("linear", in_features=2, out_features=3)
    projector.configure_model()
    projector.log = lambda *args, **kwargs: None
    batch = {"features": torch.randn(2, 4, 2), "targets": torch.randn(2, 4, 3)}
    loss = projector.training_step(batch, 0)
    torch.testing.assert_close(loss, (projector(batch["features"]) - batch["targets"]).square().mean())


def test_squares_without_a_token_are_refused() -> None:
    with pytest.raises(UserError, match=r"`projector.merge` of at least 1, got 0"):
        Projector("linear", merge=0)
