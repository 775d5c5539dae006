"""The whole: images are encoded, projected, put between the words, and answered by the language model.

Shapes: B batch, S sequence, I images, P placeholders of one image, C channels of the tower, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moextend_pl.contracts import Batch, ExtensionPlan, SampleSpec, TrainPlan, UpcycleSpec, UserError
from moextend_pl.inference.asking import AskMixin
from moextend_pl.inference.reduction import Reduction, check_asked_only, check_none_dropped
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.inference.token_merging import merge_tokens
from moextend_pl.models.base_model import compile_layers
from moextend_pl.models.delta import DeltaModule, check_start, encoder_arguments, language_arguments, load_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.feature_cache import FeatureCache, encode_once
from moextend_pl.models.fusion import scatter_features, standing_features
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.modalities.hearing import Hearing
from moextend_pl.models.model_folder import base_folder
from moextend_pl.models.projector import Projector
from moextend_pl.moe.touch import touch
from moextend_pl.moe.upcycle import upcycled_before
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.training.activations import checkpoint_blocks
from moextend_pl.training.half_precision import default_dtype
from moextend_pl.training.language_losses import LanguageOutput
from moextend_pl.training.losses import image_router_losses, learned_tokens
from moextend_pl.training.optim import OptimSpec
from moextend_pl.training.sharding.reading import share_of

log = logging.getLogger(__name__)
Place = str | Path | None
BASES = ("encoder", "encoder_unread", "language", "routers", "sound_encoder")


class MoExtend(AskMixin, DeltaModule):
    """A vision tower, a projector and a mixture-of-experts language model as one.

    Args:
        encoder: The tower; frozen unless the training plan names `encoder`.
        projector: From features to embeddings; its widths are filled in.
        language: The language model; grown by the extension plan.
        hearing: The sense of hearing, where there is one.
        init_from: Run directory (or delta file) of an earlier stage whose new weights are the start.
        cache_features: Whether features of a frozen tower are computed once an image and kept, up to 1 GiB.
        activation_checkpointing: Whether blocks of the tower and the projector, where they learn, compute their
            activations again in the backward pass; for the language model `compute` says it.
        optim: Optimizer of the stage.
    """

    def __init__(
        self,
        *,
        encoder: VisionEncoder,
        projector: Projector,
        language: MoELanguageModel,
        hearing: Hearing | None = None,
        init_from: str | None = None,
        cache_features: bool = True,
        activation_checkpointing: bool = False,
        optim: OptimSpec | None = None,
    ) -> None:
        super().__init__(optim)
        check_asked_only(language.generation.reduce)
        projector.check_tiles(encoder.config["tiles"])
        self.encoder, self.projector, self.language, self.hearing = encoder, projector, language, hearing
        self.init_from = Path(init_from) if init_from else None
        self.cache_features, self.activation_checkpointing = cache_features, activation_checkpointing
        self.features = FeatureCache()
        self.inherited: set[str] = set()
        if self.init_from is not None:
            check_start(self, self.init_from)

    @classmethod
    def load(cls, run: str | Path, base: Place = None, tower: Place = None, quantize: str | None = None) -> MoExtend:
        """Loads the model of a finished run: its base, its extension plan and its delta.

        Args:
            run: Run directory with `manifest.json` and `delta.safetensors`.
            base: Where the base lies, if not where the run says: folder, GGUF file, or `org/name` of a hub.
            tower: Where the vision tower lies, likewise.
            quantize: `nf4` holds the base in 4 bits; None as the run did.

        Returns:
            The model, built and in evaluation mode.

        Raises:
            UserError: If the directory holds no finished run or its base has changed.
        """
        manifest = read_manifest(Path(run)).with_folders(base and base_folder(str(base)), tower)
        parts = manifest.model_arguments()
        parts["language"]["quantize"] = quantize or parts["language"].get("quantize")
        heard = parts.pop("hearing", None)
        for arguments in parts.values():
            arguments["upcycle"] = UpcycleSpec.from_dict(arguments.get("upcycle"))
        try:
            model = cls(
                encoder=VisionEncoder(**encoder_arguments(parts["encoder"])),
                projector=Projector(**parts["projector"]),
                language=MoELanguageModel(**language_arguments(parts["language"])),
                hearing=None if heard is None else Hearing(**heard),
                init_from=str(run),
            )
        except TypeError as error:  # of an argument that there is not
            raise UserError(f"{manifest.run}: its manifest does not fit this version ({error}).") from error
        # Nothing learns, so that images are encoded as they were when their tower was frozen.
        model.train_plan = TrainPlan(parts=())
        with default_dtype(manifest.torch_dtype):
            model.configure_model()
        return model.to(manifest.torch_dtype).eval()

    def sample_spec(self) -> SampleSpec:
        """Returns what the model asks of its data; tokenizer and image size have this one source."""
        tokens = self.projector.tokens_per_image(self.encoder.tokens_per_image)
        facts = dict(self.hearing.facts() if self.hearing else {}, thumbnail=self.projector.thumbnail)
        facts |= {name: self.encoder.config[name] for name in ("image_size", "resize", "resample", "tiles")}
        return replace(self.language.sample_spec(), tokens_per_image=tokens, **(facts | self.encoder.image_statistics))

    def configure_model(self) -> None:
        """Builds, grows and freezes, once."""
        super().configure_model()
        if self.activation_checkpointing:
            checkpoint_blocks(self.encoder.tower, True)
            self.projector.checkpoint_activations(True)

    def build(self) -> None:
        """Builds the three parts, upcycles and grows them, and reads the weights of `init_from`.

        First the earlier stage's model, then its weights, then what changes: new experts copy what was learned.
        """
        manifest = None if self.init_from is None else read_manifest(self.init_from)
        upcycled = [] if manifest is None else upcycled_before(self.upcyclable(), manifest.model, str(self.init_from))
        self.encoder.build_base()
        self.encoder.eval()
        self.projector.in_features, self.projector.out_features = self.encoder.channels, self.language.width
        self.projector.build_base()
        self.language.build_base(share_of(self))
        self.projector.attach(self.language, self.encoder.config["tiles"])
        if self.hearing is not None:
            self.hearing.build_for(self.language.width)
        for part in upcycled:
            part.upcycle()
        earlier = () if manifest is None else manifest.plans
        for plan in earlier:
            self.language.extend(plan)
        if self.init_from is not None:
            self.inherited = load_delta(self, self.init_from)
        for part in self.upcyclable().values():
            part.upcycle()
        own = self.extension_plan
        # A run with the plan that its start was trained with goes on with it.
        if own is not None and not (earlier and own.same_growth(earlier[-1])):
            if earlier and own.layers == earlier[-1].layers and own.task == earlier[-1].task:
                log.warning(
                    "the plan grows the same layers from the same sources once more, as another extension: its options "
                    "are not those of %s. To go on with that extension, take its plan as it was.",
                    self.init_from,
                )
            self.language.extend(own)
        compile_layers(self.language.model, self.language.compute)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns `encoder`, `encoder_unread`, `projector`, the parts of the language model, and those of hearing."""
        encoder = {name: part for name, part in self.encoder.parts().items() if name != "heads"}
        heard = {} if self.hearing is None else self.hearing.parts()
        return {**encoder, **self.projector.parts(), **self.language.parts(), **heard}

    @property
    def plans(self) -> tuple[ExtensionPlan, ...]:
        """The extension plans of the built model, first one first."""
        return tuple(plan for plan, _ in self.language.extensions)

    def frozen_parts(self) -> set[str]:
        """Returns the parts of the language model that cannot learn."""
        return self.language.frozen_parts()

    def base_names(self) -> set[str]:
        """Returns the names of the parameters that the base's own files hold; all others are new."""
        base = {id(p) for part, own in self.parts().items() if part in BASES for p in own}
        base -= {id(p) for p in (*self.encoder.new_parameters(), *self.language.upcycled_parameters())}
        return {name for name, parameter in self.named_parameters() if id(parameter) in base}

    def encode(self, pixels_I3HW: Tensor, image_keys: list[str]) -> Tensor:
        """Encodes images, each only once where the tower is frozen.

        Args:
            pixels_I3HW: Normalised images.
            image_keys: Their names.

        Returns:
            (I, P, C) features.
        """
        if self.encoder.watch.listening or any(parameter.requires_grad for parameter in self.encoder.parameters()):
            return self.encoder(pixels_I3HW)
        return encode_once(self.encoder, pixels_I3HW, image_keys, self.features, self.cache_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoExtend:
        self.features.clear()  # of another device or type
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> MoExtend:
        """Changes the mode of all but a frozen tower, whose statistics of images are frozen too."""
        super().train(mode)
        self.encoder.train(mode and any(parameter.requires_grad for parameter in self.encoder.parameters()))
        return self

    def embed(self, batch: Batch, merges: int = 0) -> Tensor:
        """Embeds a batch with its image features in place.

        Args:
            batch: With as many placeholders of each image as are left of its tokens.
            merges: Rounds of merging, see `merge_tokens`.

        Returns:
            (B, S, D); parts without anything to perceive take part with a zero: no rank waits for their gradients.
        """
        embeddings_BSD = self.language.embed(batch["input_ids"])
        if self.hearing is not None:
            batch = self.with_host_facts(batch)
            embeddings_BSD = self.hearing.place(embeddings_BSD, batch, self.features, self.cache_features)
        has_image, unread = len(batch["image_keys"]) > 0, self.encoder.parts()["encoder_unread"]
        zero = touch(unread if has_image else [*self.encoder.parameters(), *self.projector.parameters()])
        embeddings_BSD = embeddings_BSD if zero is None else embeddings_BSD + zero
        if not has_image:
            return embeddings_BSD
        features_IPC = self.encode(batch["pixel_values"], batch["image_keys"])
        projected_IPD = merge_tokens(self.projector(features_IPC), merges)
        places_T = self.with_host_facts(batch)["known"].images
        if self.projector.cross_attention:
            self.language.sight.show(projected_IPD, batch["tiles"], self.projector.embed_tags(self.language.embed))
            if not self.projector.thumbnail:
                return embeddings_BSD
            projected_IPD = standing_features(projected_IPD, batch["tiles"], places_T)
        return scatter_features(embeddings_BSD, projected_IPD, places_T)

    def forward(self, batch: Batch) -> LanguageOutput:
        """Computes the losses of a batch, those of the routers of tower and projector included."""
        batch = self.with_host_facts(batch)
        routing = {
            name: part
            for name, part in (("encoder", self.encoder), ("projector", self.projector))
            if part.upcycle_spec is not None and any(parameter.requires_grad for parameter in part.parameters())
        }
        with ExitStack() as stack:
            records = {name: stack.enter_context(part.watch.recording()) for name, part in routing.items()}
            embeddings_BSD = self.embed(batch)
        output = self.language.losses(batch, embeddings_BSD)
        for name, part in routing.items():
            spec, images = part.upcycle_spec, len(batch["image_keys"])
            assert spec is not None
            losses = image_router_losses(records[name], images, part.router_calls, spec, output.loss.device)
            output = output.plus(name, losses, spec)
        return output

    def with_host_facts(self, batch: Batch) -> Batch:
        """Adds what a step must know of a batch, which costs nothing while the batch is on the host."""
        return self.language.with_host_facts(batch)

    def teardown(self, stage: str) -> None:
        """Ends a fit, validate or test run."""
        self.language.teardown(stage)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Learns to predict the supervised tokens."""
        output = self(batch)
        self.log_dict(output.metrics(), prog_bar=True, sync_dist=True)
        return self.by_tokens(output.loss, batch["labels"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy of the supervised tokens."""
        output = self.language.losses(batch, self.embed(batch), balanced=False)
        values = {"val/loss": output.token, "val/token_accuracy": output.accuracy}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=learned_tokens(batch["labels"]))

    @property
    def generation(self) -> GenerationSpec:
        """How answers are generated where a question says nothing."""
        return self.language.generation

    @torch.no_grad()
    def answer(
        self, batch: Batch, spec: GenerationSpec | None = None, heard: Callable[[str], None] | None = None
    ) -> list[str]:
        """Generates one text for each prompt of the batch, see `MoELanguageModel.answer`."""
        reduction = Reduction.parse((spec or self.generation).reduce)
        check_none_dropped(reduction, self.projector.cross_attention > 0)
        return self.language.answer(batch, partial(self.embed, merges=reduction.rounds), spec, heard)
