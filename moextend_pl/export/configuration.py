"""The configuration of an exported model, as its `config.json` holds it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class MoExtendConfig(PreTrainedConfig):
    """What builds an exported model again.

    Args:
        text_config: Configuration of the base language model.
        encoder: The tower: `name` and `tower_args` of a timm one or `config` of a transformers one, `layer`, `pool`,
            `scales`, `reference`, `grid_side`, `upcycle`, and `together`, how many images are encoded at a time: with
            1, which is faster on a CPU, features may differ from the run's in their last bit.
        projector: `depth`, `merge`, `in_features`, `out_features` and `upcycle`; where tokens look at images also
            `cross_attention`, `thumbnail`, and `tags`, ids looked at with tiles, -1 behind those of shorter ones.
        upcycle: How the MLPs of the language model became experts; None if they did not.
        plans: Extension plans, first one first, as `ExtensionPlan.to_dict` writes them.
        image_token_id: Id that stands on every place that an image feature fills.
        context: Longest sequence of the model, in positions; None if it says none.
        task: Name of the task of all questions, where the model was extended for several.
        kwargs: What every configuration of transformers has.
    """

    model_type = "moextend"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - as transformers declares it
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        encoder: dict[str, Any] | None = None,
        projector: dict[str, Any] | None = None,
        upcycle: dict[str, Any] | None = None,
        plans: list[dict[str, Any]] | None = None,
        image_token_id: int | None = None,
        context: int | None = None,
        task: str = "",
        **kwargs: Any,
    ) -> None:
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.encoder, self.projector, self.upcycle = encoder or {}, projector or {}, upcycle
        self.plans, self.image_token_id = plans or [], image_token_id
        self.context, self.task = context, task
        super().__init__(**kwargs)
