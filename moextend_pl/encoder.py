"""The vision tower: images to a grid of features, from timm or transformers, usually frozen.

Shapes: I images, H = W side in pixels, P tokens of one image, C channels, D width of the shared space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from moextend_pl.batch_norm import share_statistics
from moextend_pl.contracts import Batch, SampleSpec, UserError
from moextend_pl.optim import OptimSpec
from moextend_pl.stage import StageModule, shapes_only

CONFIG_FILE, WEIGHTS_FILE = "encoder.json", "encoder.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
TIMM = "timm/"


def vision_half(model: Any) -> Any:
    """Returns the image side of a transformers model of images and texts (CLIP, SigLIP); another model as it is."""
    return getattr(model, "vision_model", model) if hasattr(model.config, "vision_config") else model


class VisionEncoder(StageModule):
    """Encodes images into P tokens each; trained alone, it learns by contrast with captions.

    Args:
        name: `timm/<model>` for a timm model, or the folder of a transformers vision model, or of a CLIP or SigLIP
            model, of which the image side is taken.
        path: Folder written by `save_pretrained`; it replaces all other arguments of the tower.
        layer: For timm the index of the feature level, for transformers the index of the hidden state.
        pool: Side of the squares over which the feature grid is averaged.
        image_size: Side in pixels.
        tower_args: Further arguments of `timm.create_model`.
        tokenizer: Folder of a tokenizer; needed only to train the tower alone.
        embedding_dim: Width of the space shared with captions when the tower is trained alone.
        optim: Optimizer of the contrastive training.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        path: str | None = None,
        layer: int = -2,
        pool: int = 1,
        image_size: int = 224,
        tower_args: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        embedding_dim: int = 64,
        optim: OptimSpec | None = None,
    ) -> None:
        super().__init__(optim)
        self.path = Path(path) if path else None
        self.tokenizer_path = tokenizer
        self.embedding_dim = embedding_dim
        own: dict[str, Any] = {
            "name": name,
            "layer": layer,
            "pool": pool,
            "image_size": image_size,
            "tower_args": tower_args or {},
        }
        self.config: dict[str, Any] = own if self.path is None else self._read_config(self.path)
        if not self.config["name"]:
            raise UserError("Expected `name` or `path` of the vision encoder, got neither. Set one in the stage file.")
        if not self.is_timm and not (Path(self.config["name"]) / "config.json").is_file():
            raise UserError(
                f"Expected a transformers vision model in {self.config['name']}, found no config.json. Put the model "
                "there, correct `encoder.name`, or name a timm model as `timm/<model>`."
            )

    @staticmethod
    def _read_config(path: Path) -> dict[str, Any]:
        if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
            raise UserError(
                f"Expected a vision encoder ({CONFIG_FILE} and {WEIGHTS_FILE}) in {path}, found none. "
                "Run the stage that trains it, or correct `encoder.path`."
            )
        return dict(json.loads((path / CONFIG_FILE).read_text()))

    @property
    def is_timm(self) -> bool:
        """Whether the tower is a timm model; else it is a transformers one."""
        return str(self.config["name"]).startswith(TIMM)

    def _make_tower(self) -> Any:
        name = str(self.config["name"])
        if not self.is_timm:
            # With `path`, the weights come from there and only the configuration from the folder `name`.
            config = AutoConfig.from_pretrained(name, local_files_only=True)
            return vision_half(AutoModel.from_config(config, dtype=torch.float32))
        return timm.create_model(
            name.removeprefix(TIMM),
            features_only=True,
            out_indices=(self.config["layer"],),
            **self.config["tower_args"],
        )

    def build(self) -> None:
        """Builds the tower, and the two heads of the contrast if it is the trained module itself."""
        self.tower: Any = self._make_tower()
        if self.path is not None and not shapes_only():
            self.tower.load_state_dict(load_file(self.path / WEIGHTS_FILE))
        elif not self.is_timm and not shapes_only():
            options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
            self.tower = vision_half(AutoModel.from_pretrained(self.config["name"], **options))
        if self.tokenizer_path is not None:
            share_statistics(self.tower)
            words = len(self._tokenizer())
            self.image_head = nn.Linear(self.channels, self.embedding_dim)
            self.caption_head = nn.EmbeddingBag(words, self.embedding_dim, mode="mean")
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.tokenizer_path, local_files_only=True)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns `encoder`, and `heads` where the tower is trained alone."""
        tower = list(self.tower.parameters())
        known = {id(parameter) for parameter in tower}
        return {"encoder": tower, "heads": [p for p in self.parameters() if id(p) not in known]}

    @property
    def channels(self) -> int:
        """C, channels of one token."""
        if self.is_timm:
            return int(self.tower.feature_info.channels()[-1])
        return int(getattr(self.tower.config, "vision_config", self.tower.config).hidden_size)

    @property
    def image_statistics(self) -> dict[str, tuple[float, float, float]]:
        """`image_mean` and `image_std` that pixels are normalised with: those that a transformers tower learned with.

        Raises:
            UserError: If a transformers tower does not say.
        """
        if self.is_timm:
            return {}
        path = Path(self.config["name"]) / PREPROCESSOR_FILE
        try:
            facts = json.loads(path.read_text())
            red_green_blue = {name: facts[name] for name in ("image_mean", "image_std")}
            return {name: (float(r), float(g), float(b)) for name, (r, g, b) in red_green_blue.items()}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"Expected `image_mean` and `image_std` in {path}, got {error!r}. Take the file from where the tower's "
                "weights come from."
            ) from error

    def rebuild_arguments(self) -> dict[str, Any]:
        """Returns the arguments that build this tower with these weights again.

        Raises:
            UserError: If it is a timm tower that was never saved.
        """
        if self.path is not None:
            return {"path": str(self.path)}
        if self.is_timm:
            raise UserError("Expected `encoder.path`, so that the run can be loaded again. Save the timm tower first.")
        return dict(self.config)

    @cached_property
    def tokens_per_image(self) -> int:
        """P, tokens of one image after pooling; needs no built tower."""
        return (self._grid_side // int(self.config["pool"])) ** 2

    @cached_property
    def _grid_side(self) -> int:
        if self.is_timm:
            with torch.device("meta"):
                reduction = self._make_tower().feature_info.reduction()[-1]
            return int(self.config["image_size"]) // int(reduction)
        config = AutoConfig.from_pretrained(self.config["name"], local_files_only=True)
        return int(self.config["image_size"]) // int(getattr(config, "vision_config", config).patch_size)

    def sample_spec(self) -> SampleSpec:
        """Returns what the tower asks of its data.

        Raises:
            UserError: If no tokenizer is set; MoExtend brings its own.
        """
        if self.tokenizer_path is None:
            raise UserError("Expected `tokenizer` to train the vision encoder alone, got none. Name its folder.")
        tokenizer = self._tokenizer()
        side = int(self.config["image_size"])
        obstacle = "the contrastive loss compares each image with the text of its row"
        return SampleSpec(tokenizer, len(tokenizer), self.tokens_per_image, side, packing_obstacle=obstacle)

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixels_I3HW: Normalised images.

        Returns:
            (I, P, C) features, row by row.
        """
        grid_ICHW = self._grid(pixels_I3HW)
        pool = int(self.config["pool"])
        grid_ICHW = F.avg_pool2d(grid_ICHW, pool) if pool > 1 else grid_ICHW
        return grid_ICHW.flatten(2).transpose(1, 2)

    def _grid(self, pixels_I3HW: Tensor) -> Tensor:
        if self.is_timm:
            return self.tower(pixels_I3HW)[-1]
        side = self._grid_side
        hidden = self.tower(pixel_values=pixels_I3HW, output_hidden_states=True).hidden_states[self.config["layer"]]
        patches = hidden[:, -side * side :]  # a class token, if any, comes first
        return patches.transpose(1, 2).unflatten(2, (side, side))

    def save_pretrained(self, path: Path) -> None:
        """Writes the tower without its training heads, readable by `VisionEncoder(path=...)`."""
        path.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.tower.state_dict().items()}, path / WEIGHTS_FILE)
        (path / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")

    def _contrast(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images_ID = F.normalize(self.image_head(self(batch["pixel_values"]).mean(dim=1)), dim=-1)
        captions = self._captions(batch)
        texts_ID = F.normalize(self.caption_head(captions["ids"], captions["offsets"]), dim=-1)
        # Every image is compared with the captions of all ranks, so that the loss does not depend on their number.
        texts_GD = self._from_all_ranks(texts_ID).reshape(-1, self.embedding_dim)
        names_G = self._from_all_ranks(captions["names"]).reshape(-1)
        same_IG = captions["names"].unsqueeze(1) == names_G.unsqueeze(0)
        log_probs_IG = (self.log_scale.exp() * images_ID @ texts_GD.T).log_softmax(dim=-1)
        positives_I = same_IG.sum(dim=1)
        loss = -(log_probs_IG.masked_fill(~same_IG, 0.0).sum(dim=1) / positives_I).mean()
        hit = same_IG.gather(1, log_probs_IG.argmax(dim=1, keepdim=True)).float().mean()
        return loss, hit

    def _from_all_ranks(self, value: Tensor) -> Tensor:
        gathered = self.all_gather(value, sync_grads=value.is_floating_point())
        assert isinstance(gathered, Tensor)
        return gathered

    @staticmethod
    def _captions(batch: Batch) -> Mapping[str, Tensor]:
        learned_BS = batch["labels"] >= 0
        counts = learned_BS.sum(dim=1)
        ids = batch["labels"][learned_BS]
        places = torch.arange(1, int(counts.max()) + 1, device=ids.device)
        rows = torch.zeros(len(counts), len(places), dtype=torch.long, device=ids.device)
        rows[places.unsqueeze(0) <= counts.unsqueeze(1)] = ids + 1
        # One number a caption, so that equal captions are found with one comparison.
        names = (rows * (places * 1_000_003 % 998_244_353)).sum(dim=1)
        return {"ids": ids, "offsets": counts.cumsum(0) - counts, "names": names}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrasts images with captions; equal captions count as one."""
        loss, accuracy = self._contrast(batch)
        self.log_dict({"train/loss": loss, "train/retrieval": accuracy}, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and the share of images whose nearest caption is their own."""
        loss, accuracy = self._contrast(batch)
        size = len(batch["keys"])
        self.log_dict({"val/loss": loss, "val/retrieval": accuracy}, prog_bar=True, sync_dist=True, batch_size=size)
