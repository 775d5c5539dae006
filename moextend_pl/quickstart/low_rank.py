"""The baseline of low rank: a dense language model whose linear maps get LoRA adapters, by `peft`.

For comparison only: `MoExtend.load`, export and serving know nothing of adapters.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from moextend_pl.contracts import UserError
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.training.optim import OptimSpec

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the linear maps of a Llama's layers."""
MARK = "lora_"
"""Stands in the names of adapters."""


class LowRankBaseline(MoExtend):
    """A model that sees, whose dense language model learns through adapters alone (LoRA, arXiv 2106.09685).

    Args:
        encoder: As of `MoExtend`.
        projector: As of `MoExtend`.
        language: As of `MoExtend`, and dense.
        rank: Of every adapter; they are scaled by 1.
        init_from: As of `MoExtend`.
        optim: As of `MoExtend`.

    Raises:
        UserError: If `peft` is not installed, or the language model has experts.
    """

    def __init__(
        self,
        *,
        encoder: VisionEncoder,
        projector: Projector,
        language: MoELanguageModel,
        rank: int = 16,
        init_from: str | None = None,
        optim: OptimSpec | None = None,
    ) -> None:
        super().__init__(encoder=encoder, projector=projector, language=language, init_from=init_from, optim=optim)
        self.rank = rank
        if find_spec("peft") is None:
            raise UserError('LowRankBaseline needs peft, which is not installed: pip install "moextend_pl[real]".')
        if not self.language.dense:
            raise UserError("Expected a dense language model for adapters, got one with experts. Set `language.dense`.")

    def build(self) -> None:
        """Builds the model with the weights of `init_from`, and puts adapters beside its linear maps."""
        super().build()
        from peft import LoraConfig, inject_adapter_in_model

        wanted = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(TARGETS))
        inject_adapter_in_model(wanted, self.language.model)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns those of the model, with `adapters` of their own."""
        parts = super().parts()
        adapters = [parameter for name, parameter in self.named_parameters() if MARK in name]
        known = {id(parameter) for parameter in adapters}
        return {**parts, "language": [p for p in parts["language"] if id(p) not in known], "adapters": adapters}
