"""What a language model minimises: cross-entropy of the learned tokens, and losses of its routers.

Shapes: A learned positions, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from moextend_pl.contracts import IGNORE_INDEX, UpcycleSpec
from moextend_pl.moe.blocks import list_blocks
from moextend_pl.moe.extension.extended_router import extended_by, open_tokens
from moextend_pl.moe.usage import RouterRecord
from moextend_pl.training.losses import RouterLosses, balance_loss, global_mean, router_z_loss, token_loss


@dataclass(frozen=True)
class LanguageOutput:
    """Result of a forward pass with labels.

    Attributes:
        loss: What is minimised: `token`, and each router loss times its weight.
        token: Mean cross-entropy of the learned tokens.
        balance: Balance loss of the language model; 0 where it was not asked for.
        accuracy: Share of learned tokens predicted right.
        router: Further losses by name, not weighted: `z`, those of tower and projector, terms of distillation.
    """

    loss: Tensor
    token: Tensor
    balance: Tensor
    accuracy: Tensor
    router: dict[str, Tensor] = field(default_factory=dict)

    def plus(self, part: str, losses: RouterLosses, spec: UpcycleSpec) -> LanguageOutput:
        """Returns the output with the router losses of a part that sees images, weighted as it asks.

        Args:
            part: `encoder` or `projector`.
            losses: Its losses.
            spec: Its weights.
        """
        loss = self.loss + spec.balance * losses.balance + spec.z * losses.z
        return replace(
            self, loss=loss, router={**self.router, f"balance_{part}": losses.balance, f"z_{part}": losses.z}
        )

    def metrics(self) -> dict[str, Tensor]:
        """Returns what a training step logs, by name."""
        router = {f"train/{name}": value for name, value in self.router.items()}
        return {"train/loss": self.token, "train/balance": self.balance, **router}


@dataclass(frozen=True)
class RouterWeights:
    """Weights of the router losses.

    Attributes:
        balance: Of the balance loss; MoExtend uses 0.001, CuMo 0.1.
        z: Of the router z-loss; CuMo uses 0.01.
        choices: How many of a token's choices the balance loss counts; CuMo counts 1, None counts all.
    """

    balance: float = 0.001
    z: float = 0.0
    choices: int | None = None

    def replaced_by(self, spec: UpcycleSpec | None) -> RouterWeights:
        """Returns the weights that an upcycled model asks for, or these where it is not upcycled."""
        if spec is None:
            return self
        # With all K choices counted the loss is K when routing is uniform, with the first it is 1.
        by_first = spec.counting == "reference"
        return RouterWeights(spec.balance / (1 if by_first else spec.top_k), spec.z, 1 if by_first else None)


def counted_tokens(model: nn.Module, records: Sequence[RouterRecord], real_T: Tensor) -> list[Tensor]:
    """Returns for each record the tokens that its losses are about.

    Args:
        model: The language model.
        records: What its routers did.
        real_T: False on padding and fillers.
    """
    routers = {block.layer: block.router for block in list_blocks(model)}
    # A token that may not reach new experts says nothing about how they are used. Layers that the same extensions have
    # grown share their mask.
    masks: dict[tuple[int, ...], Tensor] = {(): real_T}
    keys = [extended_by(routers[record.layer]) for record in records]
    for key, record in zip(keys, records, strict=True):
        if key not in masks:
            masks[key] = real_T & open_tokens(routers[record.layer], real_T)
    return [masks[key] for key in keys]


def language_losses(
    logits_AV: Tensor,
    labels_A: Tensor,
    records: Sequence[RouterRecord],
    masks_T: Sequence[Tensor],
    weights: RouterWeights,
) -> LanguageOutput:
    """Computes the losses of a batch.

    Args:
        logits_AV: Predictions of the learned positions, and of others.
        labels_A: Ids to predict; `IGNORE_INDEX` at the others.
        records: What the routers did; empty for a dense model.
        masks_T: For each record the tokens that count.
        weights: Weights of the router losses; a loss of weight 0 is not computed.
    """
    token = token_loss(logits_AV, labels_A)
    right = (logits_AV.argmax(dim=-1) == labels_A).float().sum()
    accuracy = global_mean(right, (labels_A != IGNORE_INDEX).sum())
    loss, balance, router = token, token.new_zeros(()), {}
    if records and weights.balance > 0:
        balance = balance_loss(records, masks_T, choices=weights.choices)
        loss = loss + weights.balance * balance
    if records and weights.z > 0:
        router["z"] = router_z_loss(records, masks_T)
        loss = loss + weights.z * router["z"]
    return LanguageOutput(loss, token, balance, accuracy, router)
