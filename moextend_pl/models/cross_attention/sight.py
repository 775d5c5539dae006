"""What each token of the next pass may look at: the tiles of its own row that its text has shown so far.

Shapes: B rows, S sequence, M most tiles of a row, N tiles of the batch, P tokens of a tile, L of its tag, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import Batch, UserError
from moextend_pl.samples.host_facts import Looked, looked_at


def visible_tiles(batch: Batch, shown_BM: Tensor) -> Tensor:
    """Returns which tiles each token may look at, (B, S, M).

    What stands for a tile (its tag, or the thumbnail of its picture) looks at it alone, other tokens at all tiles that
    stand before them in their document.

    Args:
        batch: With `tiles`, and `documents` where rows are packed.
        shown_BM: As `host_facts.Looked` has it.
    """
    tiles_BS1 = batch["tiles"].unsqueeze(2)
    own_BSM = (tiles_BS1 == shown_BM.unsqueeze(1)) & (tiles_BS1 > 0)
    seen_BSM = own_BSM | ((tiles_BS1 == 0) & (own_BSM.cumsum(dim=1) > 0))
    documents_BS = batch.get("documents", batch["attention_mask"])
    of_tile_BM = (own_BSM * documents_BS.unsqueeze(2)).amax(dim=1)
    return seen_BSM & (documents_BS.unsqueeze(2) == of_tile_BM.unsqueeze(1))


class Sight:
    """What the passes that follow look at: a prompt or a training batch, and the cached steps of decoding behind it."""

    def __init__(self) -> None:
        self._looked: Looked | None = None
        self._visible_BSM: Tensor | None = None
        self._features_NPD: Tensor | None = None
        self._tiles: Tensor | None = None
        self._of: Tensor | None = None
        self._tags: tuple[Tensor, Tensor] | None = None
        self._shown: dict[int, Tensor] = {}

    def open(self, batch: Batch, image_token_id: int) -> None:
        """Declares the next batch; one without tiles looks at nothing.

        Args:
            batch: With `known` of its host where a device must not be asked.
            image_token_id: Id of image placeholders.
        """
        self._looked = self._visible_BSM = self._tiles = None
        self._shown = {}
        if "tiles" in batch and batch["image_keys"]:
            known = batch.get("known")
            if known is not None and known.looked is not None:
                self._looked = Looked(*known.looked)
            else:
                self._looked = looked_at(batch, image_token_id)
            self._visible_BSM, self._tiles = visible_tiles(batch, self._looked.shown), batch["tiles"]

    def close(self) -> None:
        """Forgets what the last batch looked at."""
        self._looked = self._visible_BSM = self._tiles = self._features_NPD = self._of = self._tags = None
        self._shown = {}

    def show(self, features_NPD: Tensor, tiles_BS: Tensor, tags: tuple[Tensor, Tensor] | None = None) -> None:
        """Takes what there is to look at.

        Args:
            features_NPD: Projected features of a batch's tiles, in their order.
            tiles_BS: `tiles` of the batch, by which it is known.
            tags: (., L, D) embedded tags of the first, second and further tiles of a picture, which are looked at
                with their features, and (., L) which places are theirs; None where they stand among the words.
        """
        self._features_NPD, self._of, self._tags, self._shown = features_NPD, tiles_BS, tags, {}

    @property
    def nothing(self) -> bool:
        """Whether no token looks at anything."""
        return self._looked is None

    def shown(self, rows: int) -> Tensor:
        """Returns the features that each row may look at, tags before them, (rows, M * (L + P), D).

        Args:
            rows: Those of the pass; beams of a prompt stand side by side.

        Raises:
            UserError: If nobody encoded the batch's pictures.
        """
        assert self._looked is not None
        if self._features_NPD is None or self._of is not self._tiles:
            raise UserError("Expected the features of pictures before words are read, got none. Call `embed` first.")
        if rows not in self._shown:
            padded = F.pad(self._features_NPD, (0, 0, 0, 0, 1, 0))  # number 0 is no tile
            chosen = padded.index_select(0, self._looked.images.flatten())
            if self._tags is not None:
                tags = self._tags[0].index_select(0, self._looked.places.flatten())
                chosen = torch.cat([tags.to(chosen.dtype), chosen], dim=1)
            each_BKD = chosen.reshape(len(self._looked.images), -1, padded.shape[-1])
            self._shown[rows] = each_BKD.repeat_interleave(rows // len(each_BKD), dim=0)
        return self._shown[rows]

    def mask(self, rows: int, tokens: int) -> Tensor:
        """Returns what each token of a pass may look at, (rows, tokens, M * (L + P)).

        Args:
            rows: As in `shown`.
            tokens: Those of the prompt, or fewer that were generated behind it, which see all tiles of their row.
        """
        assert self._looked is not None
        assert self._visible_BSM is not None
        assert self._features_NPD is not None
        visible = self._visible_BSM
        if tokens != visible.shape[1]:
            visible = visible.any(dim=1, keepdim=True).expand(-1, tokens, -1)
        places = visible.unsqueeze(3).expand(-1, -1, -1, self._features_NPD.shape[1])
        if self._tags is not None:
            is_tag_BML = self._tags[1][self._looked.places]
            places = torch.cat([visible.unsqueeze(3) & is_tag_BML.unsqueeze(1), places], dim=3)
        places = places.flatten(2)
        return places.repeat_interleave(rows // len(places), dim=0)
