"""The mixture-of-experts language model: any transformers v5 one, frozen or learning, grown or not.

Shapes: B batch, S sequence, T = B * S tokens, D width, V vocabulary, A learned positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moextend_pl.contracts import Batch, ExtensionPlan, HostFacts, SampleSpec, UpcycleSpec, UserError
from moextend_pl.inference import decoding
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.inference.token_pruning import dropping
from moextend_pl.models import base_model
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.cross_attention.sight import Sight
from moextend_pl.models.model_folder import base_folder, read_config, stock_form
from moextend_pl.moe import dispatch
from moextend_pl.moe.blocks import find_blocks, list_blocks
from moextend_pl.moe.extension.growth import grow, new_parameters, router_parameters
from moextend_pl.moe.extension.reach import OneAtATime, Reach, is_reachable, reachable
from moextend_pl.moe.kernels.norms import use_liger_norms
from moextend_pl.moe.upcycle import upcycle, upcycled_mlps
from moextend_pl.moe.watch import RouterWatch
from moextend_pl.samples.host_facts import sensed, with_host_facts
from moextend_pl.samples.packing import attention_inputs, packing_obstacle, sample_tokens
from moextend_pl.samples.templates import load_tokenizer
from moextend_pl.training.activations import checkpoint_activations
from moextend_pl.training.answers import AnswerMixin
from moextend_pl.training.half_precision import Place, apply_but_for, exact_places
from moextend_pl.training.language_losses import LanguageOutput, RouterWeights, counted_tokens, language_losses
from moextend_pl.training.losses import learned_tokens
from moextend_pl.training.optim import OptimSpec
from moextend_pl.training.sharding.reading import Share, share_of
from moextend_pl.training.stage import StageModule, shapes_only


class MoELanguageModel(AnswerMixin, StageModule):
    """A causal language model with mixture-of-experts layers; trained alone by next-token prediction.

    Args:
        base: Folder of a transformers model, GGUF file, `org/name` of a hub, or a new model's values with `model_type`.
        tokenizer: Folder of the tokenizer; by default that of the base.
        chat_template: `inst` (MoExtend's), a file with a Jinja template, or null for the tokenizer's own.
        dense: Whether the base is meant to be a model without experts.
        upcycle: How the MLPs of a dense base become mixtures of experts; None leaves them dense.
        router_losses: Weights of the router losses; `upcycle` replaces them by its own.
        compute: Implementation of the experts, 4 bits, activation checkpointing.
        generation: How answers are generated.
        optim: Optimizer, where the model is trained alone.

    Raises:
        UserError: If a folder is missing, or the options do not fit together.
    """

    def __init__(
        self,
        *,
        base: str | dict[str, Any],
        tokenizer: str | None = None,
        chat_template: str | None = None,
        dense: bool = False,
        upcycle: UpcycleSpec | None = None,
        router_losses: RouterWeights | None = None,
        compute: ComputeSpec | None = None,
        generation: GenerationSpec | None = None,
        optim: OptimSpec | None = None,
    ) -> None:
        super().__init__(optim)
        self.router_losses = router_losses or RouterWeights()
        self.compute, self.generation = compute or ComputeSpec(), generation or GenerationSpec()
        self.base = None if isinstance(base, dict) else base_folder(base)
        base_model.check_options(self.base or base, tokenizer, self.compute, upcycle is not None)
        self.config = dict(base) if isinstance(base, dict) else {}
        self.tokenizer_path, self.chat_template, self.dense = tokenizer or str(self.base), chat_template, dense
        self.upcycle_spec = upcycle
        self.extensions: list[tuple[ExtensionPlan, Reach]] = []
        self.watch, self.turn, self.sight = RouterWatch(), OneAtATime(), Sight()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._opened_to_text = False
        self._exact: list[Place] = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, read once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_path, self.chat_template)
        return self._tokenizer

    def model_config(self) -> PreTrainedConfig:
        """Returns the transformers configuration, read or made from `config`; needs no built network."""
        return base_model.new_config(self.config, self.tokenizer) if self.base is None else read_config(self.base)

    @property
    def width(self) -> int:
        """D, width of the embeddings; needs no built network."""
        return int(self.model_config().get_text_config().hidden_size)

    @cached_property
    def image_token_id(self) -> int:
        """Id of the image placeholder: the first one outside the vocabulary, so that the base stays as it is."""
        return max(int(self.model_config().get_text_config().vocab_size), len(self.tokenizer))

    def sample_spec(self) -> SampleSpec:
        """Returns what the model asks of text-only data."""
        config = self.model_config()
        facts: dict[str, Any] = {"packing_obstacle": packing_obstacle(config, self.compute.attn_implementation)}
        return SampleSpec(self.tokenizer, self.image_token_id, 0, 0, **facts, context=decoding.context_of(config))

    def build(self) -> None:
        """Reads or makes the model, upcycles it, and grows it by the extension plan where it is trained alone."""
        self.build_base(share_of(self))
        self.upcycle()
        if self.extension_plan is not None:
            self.extend(self.extension_plan)
        base_model.compile_layers(self.model, self.compute)

    def build_base(self, share: Share | None = None) -> None:
        """Reads or makes the model as its files or its configuration describe it, or the `share` that is held here.

        Raises:
            UserError: If it has no experts and is not said to be dense, or the other way round.
        """
        if self.base is None or shapes_only():
            config = self.model_config()
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
        else:
            dense = self.dense or self.upcycle_spec is not None
            self.model = base_model.load_base(self.base, self.compute.quantize, dense, share)
        base_model.set_attention(self.model, self.compute.attn_implementation)
        self._exact = exact_places(self.model)
        if not self.dense and self.upcycle_spec is None:
            find_blocks(self.model)
            dispatch.use(self.model, self.compute.experts_implementation)
        elif list_blocks(self.model):
            raise UserError(
                f"Expected a dense base for `language.dense` or `language.upcycle`, got {type(self.model).__name__}, "
                "which has experts. Remove the two, or name another base."
            )
        use_liger_norms(self.model, self.compute.liger)
        if self.compute.activation_checkpointing:
            checkpoint_activations(self.model)
        self.model.train()
        self.watch.attach(self.model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoELanguageModel:
        apply_but_for(self._exact, partial(super()._apply, fn, recurse), fn)
        return self

    def upcycle(self) -> None:
        """Turns the MLPs of a dense model into experts where that is asked for; does nothing the second time."""
        if self.upcycle_spec is not None:
            base_model.check_base(self.base, self.compute.quantize, upcycled=True)
            upcycle(self.model, self.upcycle_spec)
            self.watch.attach(self.model)

    def upcycled_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of upcycled MLPs, which the files of the base do not hold."""
        return [parameter for _, mlp in upcycled_mlps(self.model) for parameter in mlp.parameters()]

    def extend(self, plan: ExtensionPlan) -> None:
        """Grows the built model by a plan, on top of the plans before it.

        Args:
            plan: The plan; its sources may be experts that an earlier plan added.

        Raises:
            UserError: If the plan does not fit the model.
        """
        reach = Reach()
        grow(self.model, plan, reach)
        self.extensions.append((plan, reach))
        self.watch.attach(self.model)

    @property
    def num_experts(self) -> dict[int, int]:
        """Number of experts of each mixture-of-experts layer, new ones included."""
        return {block.layer: block.num_experts for block in list_blocks(self.model)}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns `language`, `routers` (of the base), the parts of the latest extension, and earlier ones."""
        latest = self.extensions[-1][1] if self.extensions else None
        parts = {"routers": router_parameters(self.model), **new_parameters(self.model, latest)}
        listed = {id(parameter) for parameters in parts.values() for parameter in parameters}
        return {"language": [p for p in self.model.parameters() if id(p) not in listed], **parts}

    def frozen_parts(self) -> set[str]:
        """Returns `language` where the base is in 4 bits, which no gradient can change."""
        return set() if self.compute.quantize is None else {"language"}

    def open_to_text(self, is_open: bool) -> None:
        """Lets all tokens reach new experts, or forbids it again, whatever the plans say."""
        self._opened_to_text = is_open

    def set_reach(self, batch: Batch) -> None:
        """Declares which tokens of the next passes may reach the new experts of each extension.

        Args:
            batch: `input_ids` (B, S), `tasks` where a plan belongs to a task, `documents` where rows are packed.
        """
        self.sight.open(batch, self.image_token_id)
        tasks = batch.get("tasks")
        for plan, reach in self.extensions:
            routing = "open" if self._opened_to_text else plan.routing
            sensed_BS, count = sensed(batch, self.image_token_id, routing)
            somewhere = None if count is None else is_reachable(routing, plan.task, tasks, count)
            reach.set(reachable(routing, plan.task, sensed_BS, tasks, batch.get("documents")), somewhere)

    def close_reach(self) -> None:
        """Lets no token reach a new expert, nor look at an image, as a model that nobody told of one."""
        self.sight.close()
        for _, reach in self.extensions:
            reach.set(None)

    def teardown(self, stage: str) -> None:
        """Closes what the last batch opened: the transformers model may be called by itself next."""
        self.close_reach()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeds ids; placeholders, which lie outside the vocabulary, become the embedding of id 0."""
        return self.model.get_input_embeddings()(input_ids.masked_fill(input_ids >= self.image_token_id, 0))

    def with_host_facts(self, batch: Batch) -> Batch:
        """Adds what a step must know of a batch, which costs nothing while the batch is on the host."""
        return with_host_facts(batch, self.image_token_id)

    def forward(self, batch: Batch, embeddings: Tensor | None = None, known: HostFacts | None = None) -> Tensor:
        """Predicts the next token.

        Args:
            batch: `input_ids` and `attention_mask` (B, S), and `documents` where rows are packed.
            embeddings: (B, S, D) with image features in place; by default the embedded ids.
            known: Which positions to predict from; by default all.

        Returns:
            (B, S, V) logits, or (A, V) at the A chosen positions.
        """
        self.set_reach(batch)
        inputs = {"input_ids": batch["input_ids"]} if embeddings is None else {"inputs_embeds": embeddings}
        inputs.update(attention_inputs(self.model, batch))
        return base_model.logits_of(self.model, inputs, known)

    def losses(self, batch: Batch, embeddings: Tensor | None = None, balanced: bool = True) -> LanguageOutput:
        """Computes the losses of a batch; the head is applied to learned positions only.

        Args:
            batch: With labels.
            embeddings: As in `forward`.
            balanced: Whether the balance loss is added.
        """
        batch = self.with_host_facts(batch)
        known = batch["known"]
        with self.watch.recording() as records:
            logits_AV = self(batch, embeddings, known)
        masks = counted_tokens(self.model, records, sample_tokens(batch).reshape(-1))
        weights = self.router_losses.replaced_by(self.upcycle_spec) if balanced else RouterWeights(balance=0.0)
        return language_losses(logits_AV, known.targets, records, masks, weights)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Learns to predict the supervised tokens."""
        output = self.losses(batch)
        self.log_dict(output.metrics(), prog_bar=True, sync_dist=True)
        return self.by_tokens(output.loss, batch["labels"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy of the supervised tokens."""
        output = self.losses(batch, balanced=False)
        values = {"val/loss": output.token, "val/token_accuracy": output.accuracy}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=learned_tokens(batch["labels"]))

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        embed: Callable[[Batch], Tensor] | None = None,
        spec: GenerationSpec | None = None,
        heard: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Generates texts for a batch, see `decoding.answers`, one call at a time; ids are embedded by default."""
        embed, spec = embed or (lambda prompts: self.embed(prompts["input_ids"])), spec or self.generation
        is_image_BS = batch["input_ids"] == self.image_token_id
        with self.turn, dropping(self.model, spec.reduce, is_image_BS, batch["attention_mask"]):
            self.set_reach(batch)
            try:
                return decoding.answers(self.model, self.tokenizer, batch, embed, spec, heard)
            finally:
                self.close_reach()

    def save_pretrained(self, path: Path) -> None:
        """Writes model and tokenizer in the transformers layout, an upcycled Llama or Mistral as a Mixtral."""
        stock_form(self.model, self.upcycle_spec).save_pretrained(path)
        self.tokenizer.save_pretrained(path)
