"""Maps image features into the embedding space of the language model.

Shapes: I images, P tokens of an image, C channels of the tower, D width of the language model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moextend_pl.contracts import SampleSpec, UpcycleSpec, UserError
from moextend_pl.models.cross_attention.gated_attention import attach
from moextend_pl.models.fusion import dense_layers, merge_neighbours
from moextend_pl.moe.dense_mlp import read_mlp
from moextend_pl.moe.upcycle import UpcycledMLP
from moextend_pl.moe.watch import RouterWatch
from moextend_pl.samples.tiling.tags import tag_table
from moextend_pl.samples.tiling.tiles import Tiling
from moextend_pl.training.optim import OptimSpec
from moextend_pl.training.stage import StageModule

if TYPE_CHECKING:
    from moextend_pl.models.language import MoELanguageModel


class Projector(StageModule):
    """Linear map or small network between tower and language model.

    Args:
        kind: `linear`, or `mlpNx_gelu` for N linear maps with GELU between them (LLaVA-1.5: `mlp2x_gelu`).
        merge: Side of the squares of tokens that are joined into one; 1 keeps them.
        cross_attention: If not 0, features do not stand among the words: tokens look at them by gated cross-attention
            before the last of every so many decoder layers (NVLM-X); `encoder.features.tiles` must have tags.
        thumbnail: Whether with `cross_attention` a picture's thumbnail stands among the words and they look at its
            tiles (NVLM-H).
        in_features: C; MoExtend fills it in from the tower.
        out_features: D; MoExtend fills it in from the language model.
        upcycle: How an `mlp2x_gelu` becomes a mixture of experts (CuMo's MLP-MoE); None leaves it dense.
        optim: Optimizer, where the projector is trained alone.

    Raises:
        UserError: If `kind` is not known, or is to be upcycled and is no MLP of two layers, or a number is too small.
    """

    layers: nn.Sequential | UpcycledMLP
    tags: Tensor | None

    def __init__(
        self,
        kind: str = "mlp2x_gelu",
        merge: int = 1,
        cross_attention: int = 0,
        thumbnail: bool = False,
        in_features: int | None = None,
        out_features: int | None = None,
        upcycle: UpcycleSpec | None = None,
        optim: OptimSpec | None = None,
    ) -> None:
        super().__init__(optim)
        match = re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)
        if match is None:
            raise UserError(f"Expected `projector.kind` to be linear or mlpNx_gelu with N in 1..9, got {kind!r}.")
        self.depth = int(match[1] or 1)
        if upcycle is not None and (self.depth != 2 or upcycle.layers not in (None, (0,))):
            raise UserError(f"Expected `projector.upcycle` of the one MLP of kind mlp2x_gelu, got kind {kind!r}.")
        if merge < 1:
            raise UserError(f"Expected `projector.merge` of at least 1, got {merge}.")
        if cross_attention < 0:
            raise UserError(f"Expected `projector.cross_attention` of at least 0, got {cross_attention}.")
        if thumbnail and not cross_attention:
            raise UserError(
                "Expected `projector.cross_attention` beside `thumbnail`, which leaves tiles to be looked at, got 0. "
                "Set it to a number of layers, or leave out `thumbnail`."
            )
        self.kind, self.merge, self.upcycle_spec, self.cross_attention = kind, merge, upcycle, cross_attention
        self.thumbnail, self.gated = thumbnail, nn.ModuleList()
        self.register_buffer("tags", None, persistent=False)  # ids of those that are looked at with their tiles
        self.watch, self.recompute = RouterWatch(), False
        self.in_features, self.out_features = in_features, out_features

    def rebuild_arguments(self) -> dict[str, Any]:
        """Returns the arguments by which the same layers are built again, but for `upcycle`."""
        return {name: getattr(self, name) for name in ("kind", "merge", "cross_attention", "thumbnail")}

    def tokens_per_image(self, encoder_tokens: int) -> int:
        """Returns the number of places among the words that an image takes; none where words look at all images.

        Args:
            encoder_tokens: P of the tower.

        Raises:
            UserError: If the grid does not divide into squares of side `merge`.
        """
        if math.isqrt(encoder_tokens) ** 2 != encoder_tokens or math.isqrt(encoder_tokens) % self.merge:
            raise UserError(
                f"Expected a square grid whose side divides by `projector.merge` = {self.merge}, got "
                f"{encoder_tokens} tokens an image. Change `merge` or the tower's `pool`."
            )
        return 0 if self.cross_attention and not self.thumbnail else encoder_tokens // self.merge**2

    def build(self) -> None:
        """Builds the layers, upcycled where that is asked for."""
        self.build_base()
        self.upcycle()

    def upcycle(self) -> None:
        """Turns the MLP into experts where that is asked for; does nothing the second time."""
        if self.upcycle_spec is None or isinstance(self.layers, UpcycledMLP):
            return
        mlp = read_mlp(self.layers)
        assert mlp is not None
        self.layers = UpcycledMLP(mlp, self.upcycle_spec)
        # In a list, so that it has a number as blocks have.
        self.watch.attach(nn.ModuleList([self.layers]))

    @property
    def router_calls(self) -> int:
        """Number of times that a router is called for an image."""
        return len(self.num_experts)

    @property
    def num_experts(self) -> dict[int, int]:
        """Number of experts of the upcycled MLP, which has the number 0; empty where it is dense."""
        return {0: self.layers.gate.num_experts} if isinstance(self.layers, UpcycledMLP) else {}

    def build_base(self) -> None:
        """Builds the dense layers.

        Raises:
            UserError: If a width is not known.
        """
        if self.in_features is None or self.out_features is None:
            raise UserError(
                "Expected `in_features` and `out_features` of a projector on its own, got "
                f"{self.in_features} and {self.out_features}."
            )
        self.layers = dense_layers(self.in_features * self.merge**2, self.out_features, self.depth)

    def check_tiles(self, tiles: str) -> None:
        """Refuses cross-attention without tags, by which words know of pictures; `tiles` is that of the encoder.

        Raises:
            UserError: If it is so.
        """
        tiling = Tiling.parse(tiles)
        if self.cross_attention and not (tiling.most and tiling.tagged):
            raise UserError(
                f"Expected `encoder.features.tiles` with tags for `projector.cross_attention`, got {tiles!r}: a picture"
                " that is looked at stands among the words by its tags alone. Set `tiles: 6`, or `1` for whole ones."
            )

    def attach(self, language: MoELanguageModel, tiles: str) -> None:
        """Builds the layers by which a language model looks at pictures, where that is asked for; see `attach`.

        Args:
            language: Built.
            tiles: That of the encoder.
        """
        if self.cross_attention:
            self.gated = attach(language.model, self.cross_attention, language.sight, language.compute.compile)
        if self.thumbnail:
            self.tags = torch.tensor(tag_table(language.tokenizer, Tiling.parse(tiles)))

    def embed_tags(self, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Returns tags as `Sight.show` takes them; None where there are none to look at."""
        if self.tags is None or not self.tags.numel():
            return None
        return embed(self.tags.clamp(min=0)), self.tags >= 0

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns the one part, `projector`, layers of cross-attention included."""
        return {"projector": list(self.parameters())}

    def sample_spec(self) -> SampleSpec:
        """A projector alone reads features, not samples.

        Raises:
            UserError: Always.
        """
        raise UserError("A projector alone has no samples; train it inside MoExtend, or on pairs of tensors.")

    def forward(self, features_IPC: Tensor) -> Tensor:
        """Projects features.

        Args:
            features_IPC: Features of the tower.

        Returns:
            (I, P / merge^2, D).
        """
        features_IPC = merge_neighbours(features_IPC, self.merge) if self.merge > 1 else features_IPC
        if self.recompute and torch.is_grad_enabled():
            projected_IPD: Tensor = checkpoint(self.layers, features_IPC, use_reentrant=False)
            return projected_IPD
        return self.layers(features_IPC)

    def checkpoint_activations(self, enable: bool) -> None:
        """Lets a projector that learns compute its activations again in the backward pass, or keep them."""
        self.recompute = enable and any(parameter.requires_grad for parameter in self.parameters())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Learns to map `features` (I, P, C) onto `targets` (I, P, D) by mean squared error."""
        loss = F.mse_loss(self(batch["features"]), batch["targets"])
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss
