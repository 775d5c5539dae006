"""The vision tower: images to a grid of features, from timm or transformers, usually frozen.

Shapes: I images, H = W side in pixels, P tokens of one image, C channels, D width of the shared space.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.contracts import Batch, SampleSpec, UpcycleSpec, UserError
from moextend_pl.models import tower as towers
from moextend_pl.models.multiscale import checked_scales, encode_scales
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.models.tower_grid import own_side, patches_side, pooled_side, timm_own_side, timm_side
from moextend_pl.moe.blocks import list_blocks
from moextend_pl.moe.upcycle import agreed_spec, upcycle, upcycled_mlps
from moextend_pl.moe.watch import RouterWatch
from moextend_pl.samples.preprocessor import own_pictures
from moextend_pl.samples.squares import BICUBIC, SQUASH, check_resample, check_resize
from moextend_pl.samples.templates import load_tokenizer
from moextend_pl.training.batch_norm import share_statistics
from moextend_pl.training.captions import captions_of, contrast
from moextend_pl.training.optim import OptimSpec
from moextend_pl.training.stage import StageModule, shapes_only

CONFIG_FILE, WEIGHTS_FILE = "encoder.json", "encoder.safetensors"
TIMM, STATISTICS = "timm/", ("image_mean", "image_std")


class VisionEncoder(StageModule):
    """Encodes images into P tokens each; trained alone, it learns by contrast with captions.

    Args:
        name: `timm/<model>` for a timm model, or the folder of a transformers vision model, or of a CLIP or SigLIP
            model, of which the image side is taken.
        path: Folder written by `save_pretrained`; it replaces all other arguments of the tower, but for
            `upcycle`, `scales`, `reference`, `resize`, `resample` and `tiles` where they are given too.
        image_size: Side in pixels; the tower's own by default.
        tower_args: Further arguments of `timm.create_model`.
        features: What is read of the tower.
        upcycle: How the MLPs of the tower become mixtures of experts; None leaves them dense.
        tokenizer: Folder of a tokenizer; needed only to train the tower alone.
        embedding_dim: Width of the space shared with captions when the tower is trained alone.
        optim: Optimizer of the contrastive training.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        path: str | None = None,
        image_size: int | None = None,
        tower_args: dict[str, Any] | None = None,
        features: FeatureSpec | None = None,
        upcycle: UpcycleSpec | None = None,
        tokenizer: str | None = None,
        embedding_dim: int = 64,
        optim: OptimSpec | None = None,
    ) -> None:
        super().__init__(optim)
        self.path = Path(path) if path else None
        self.tokenizer_path = tokenizer
        self.embedding_dim = embedding_dim
        features = features or FeatureSpec()
        own: dict[str, Any] = {"name": name, "image_size": image_size, "tower_args": tower_args or {}}
        own.update({"layer": features.layer, "pool": features.pool})
        self.config: dict[str, Any] = own if self.path is None else self._read_config(self.path)
        if not self.config["name"]:
            raise UserError("Expected `name` or `path` of the vision encoder, got neither. Set one in the stage file.")
        if not self.is_timm:
            towers.check_folder(self.folder)
        if self.config["image_size"] is None:
            self.config["image_size"] = self._own_side()
        if self.config["image_size"] < 1:
            raise UserError(f"Expected `encoder.image_size` of at least 1, got {self.config['image_size']}.")
        said = self._own_pictures()
        self.config["resize"] = check_resize(features.resize or said["resize"], int(self.config["image_size"]))
        self.config["resample"] = check_resample(features.resample or said["resample"])
        self.config["reference"] = features.reference or bool(self.config.get("reference"))
        self.config["scales"] = checked_scales(features.scales or self.config.get("scales") or [1])
        self.config["tiles"] = towers.checked_tiles(features.tiles or self.config.get("tiles"), tokenizer is not None)
        self.stored_upcycle = UpcycleSpec.from_dict(self.config.get("upcycle"))
        self.upcycle_spec = agreed_spec(self.stored_upcycle, upcycle, f"{path}: the tower")
        self.watch = RouterWatch()

    def _own_side(self) -> int:
        return timm_own_side(str(self.config["name"]).removeprefix(TIMM)) if self.is_timm else own_side(self.folder)

    def _own_pictures(self) -> dict[str, str]:
        """Returns what the tower says of its pictures; where it does not, they are as they were before it could."""
        side = int(self.config["image_size"])
        said = self.config if self.path is not None or self.is_timm else own_pictures(self.folder, side)
        return {"resize": said.get("resize") or SQUASH, "resample": said.get("resample") or BICUBIC}

    @staticmethod
    def _read_config(path: Path) -> dict[str, Any]:
        if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
            raise UserError(
                f"Expected a vision encoder ({CONFIG_FILE} and {WEIGHTS_FILE}) in {path}, found none. "
                "Run the stage that trains it, or correct `encoder.path`."
            )
        try:
            return dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path / CONFIG_FILE}: damaged ({error}). Train or copy the tower again.") from error

    @property
    def is_timm(self) -> bool:
        """Whether the tower is a timm model; else it is a transformers one."""
        return str(self.config["name"]).startswith(TIMM)

    def rebuild_arguments(self) -> dict[str, Any]:
        """Returns the arguments that build the tower again, without `upcycle`.

        Raises:
            UserError: If its weights lie in no folder.
        """
        added = {name: self.config[name] for name in ("scales", "reference", "resize", "resample", "tiles")}
        if self.path is not None:
            return {"path": str(self.path), **added}
        if self.is_timm:
            raise UserError("Expected `encoder.path`, so that the run can be loaded again. Save the timm tower first.")
        return {**{name: self.config[name] for name in ("name", "layer", "pool", "image_size")}, **added}

    @property
    def folder(self) -> str:
        """Folder with the configuration of a transformers tower: a saved tower has its own."""
        saved = self.path is not None and (self.path / "config.json").is_file()
        return str(self.path if saved else self.config["name"])

    def _make_tower(self) -> Any:
        if not self.is_timm:
            return towers.make_tower(self.folder, with_weights=self.path is None and not shapes_only())
        name = str(self.config["name"]).removeprefix(TIMM)
        return towers.make_timm(name, int(self.config["layer"]), self.config["tower_args"])

    def build(self) -> None:
        """Builds the tower, and the two heads of the contrast if it is the trained module itself."""
        self.build_base()
        self.upcycle()
        if self.tokenizer_path is not None:
            share_statistics(self.tower)
            words = len(load_tokenizer(self.tokenizer_path))
            self.image_head = nn.Linear(self.channels, self.embedding_dim)
            self.caption_head = nn.EmbeddingBag(words, self.embedding_dim, mode="mean")
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def build_base(self) -> None:
        """Builds the tower as its files hold it.

        Raises:
            UserError: If the files lack tensors of the tower, or have others.
        """
        self.tower: Any = self._make_tower()
        if self.stored_upcycle is not None:
            upcycle(self.tower, self.stored_upcycle)
        self._reader = None
        if not self.is_timm:
            self._reader = towers.BlockReader(self.tower, int(self.config["layer"]), self.config["reference"])
        if self.path is not None and not shapes_only():
            towers.load_tower(self.tower, self.path / WEIGHTS_FILE, self._reader)
        self.watch.attach(self.tower)

    def upcycle(self) -> None:
        """Turns MLPs into experts where that is asked for; does nothing the second time."""
        if self.upcycle_spec is not None:
            upcycle(self.tower, self.upcycle_spec)
            self.watch.attach(self.tower)

    @property
    def router_calls(self) -> int:
        """Number of times that routers are called for an image."""
        return len(self.num_experts) * len(self.config["scales"])

    @property
    def num_experts(self) -> dict[int, int]:
        """Number of experts of each upcycled block, by its number; empty where the tower is dense."""
        return {block.layer: block.num_experts for block in list_blocks(self.tower)}

    def new_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the files of the tower do not hold."""
        if self.stored_upcycle is not None:
            return []
        return [parameter for _, mlp in upcycled_mlps(self.tower) for parameter in mlp.parameters()]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns `encoder`, `encoder_unread`, on which no feature depends, and `heads` of a tower trained alone."""
        unread = self._reader.unread_parameters() if self._reader else []
        known = {id(parameter) for parameter in (*unread, *self.tower.parameters())}
        apart = {id(parameter) for parameter in unread}
        return {
            "encoder": [p for p in self.tower.parameters() if id(p) not in apart],
            "encoder_unread": unread,
            "heads": [p for p in self.parameters() if id(p) not in known],
        }

    @property
    def channels(self) -> int:
        """C, channels of one token, all scales together."""
        one = self.tower.feature_info.channels()[-1] if self.is_timm else self.tower.config.hidden_size
        return int(one) * len(self.config["scales"])

    @property
    def image_statistics(self) -> dict[str, tuple[float, float, float]]:
        """`image_mean` and `image_std` that pixels are normalised with: those that a published tower learned with.

        Raises:
            UserError: If a transformers tower does not say.
        """
        told = {name: tuple(self.config[name]) for name in STATISTICS if name in self.config}
        return told if self.is_timm else towers.image_statistics(self.folder, str(self.config["name"]))

    @cached_property
    def tokens_per_image(self) -> int:
        """P, tokens of one image after pooling; needs no built tower."""
        return pooled_side(self.grid_side, int(self.config["pool"])) ** 2

    @cached_property
    def grid_side(self) -> int:
        """Side of the tower's grid before pooling; needs no built tower."""
        side = int(self.config["image_size"])
        if not self.is_timm:
            return patches_side(self.folder, side)
        with torch.device("meta"):
            return timm_side(self._make_tower().eval(), str(self.config["name"]), side)

    def sample_spec(self) -> SampleSpec:
        """Returns what the tower asks of its data.

        Raises:
            UserError: If no tokenizer is set, or its folder holds none; MoExtend brings its own.
        """
        if self.tokenizer_path is None:
            raise UserError("Expected `tokenizer` to train the vision encoder alone, got none. Name its folder.")
        tokenizer = load_tokenizer(self.tokenizer_path)
        side = int(self.config["image_size"])
        obstacle = "the contrastive loss compares each image with the text of its row"
        how: dict[str, Any] = {name: self.config[name] for name in ("resize", "resample")}
        return SampleSpec(tokenizer, len(tokenizer), self.tokens_per_image, side, packing_obstacle=obstacle, **how)

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixels_I3HW: Normalised images.

        Returns:
            (I, P, C) features, row by row.
        """
        grid_ICHW = encode_scales(self._grid, pixels_I3HW, self.config["scales"])
        return towers.pooled_tokens(grid_ICHW, int(self.config["pool"]))

    def _grid(self, pixels_I3HW: Tensor) -> Tensor:
        return towers.read_grid(self.tower, self._reader, pixels_I3HW, self.grid_side)

    def save_pretrained(self, path: Path) -> None:
        """Writes the tower without its training heads, readable by `VisionEncoder(path=...)`."""
        path.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.tower.state_dict().items()}, path / WEIGHTS_FILE)
        spec = asdict(self.upcycle_spec) if self.upcycle_spec else None
        (path / CONFIG_FILE).write_text(json.dumps({**self.config, "upcycle": spec}, indent=2) + "\n")
        if not self.is_timm:
            towers.save_facts(self.tower, path, self.folder, str(self.config["name"]))

    def _contrast(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images_ID = F.normalize(self.image_head(self(batch["pixel_values"]).mean(dim=1)), dim=-1)
        captions = captions_of(batch)
        texts_ID = F.normalize(self.caption_head(captions["ids"], captions["offsets"]), dim=-1)
        # Every image is compared with the captions of all ranks, so that the loss does not depend on their number.
        texts_GD = self._from_all_ranks(texts_ID).reshape(-1, self.embedding_dim)
        names_G = self._from_all_ranks(captions["names"]).reshape(-1)
        same_IG = captions["names"].unsqueeze(1) == names_G.unsqueeze(0)
        return contrast(self.log_scale.exp() * images_ID @ texts_GD.T, same_IG)

    def _from_all_ranks(self, value: Tensor) -> Tensor:
        gathered = self.all_gather(value, sync_grads=value.is_floating_point())
        assert isinstance(gathered, Tensor)
        return gathered

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrasts images with captions; equal captions count as one."""
        loss, accuracy = self._contrast(batch)
        self.log_dict({"train/loss": loss, "train/retrieval": accuracy}, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and the share of images whose nearest caption is their own."""
        loss, accuracy = self._contrast(batch)
        values = {"val/loss": loss, "val/retrieval": accuracy}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(batch["keys"]))
