"""What stands in a text where a picture does: for each tile its tag, written as text, and its placeholders.

And where a sound does: placeholders, as many for each, under an id of their own.
"""

from __future__ import annotations

import re
from functools import cache

from transformers import PreTrainedTokenizerBase

from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.samples.tiling.tiles import Tiling
from moextend_pl.samples.turns import IMAGE_MARK, SOUND_MARK

THUMBNAIL_TAG = "<tile_global_thumbnail>"


def tile_tags(squares: int, most: int) -> list[str]:
    """Returns the tags of a picture's tiles in their order (NVLM's 1-D tags), the thumbnail's last.

    Args:
        squares: Tiles of the picture, thumbnail included; a single one is the thumbnail.
        most: Most tiles of any picture; from 10 on numbers have two digits, so that tags are of equal length.
    """
    digits = len(str(most))
    return [*(f"<tile_{number:0{digits}}>" for number in range(1, squares)), THUMBNAIL_TAG]


class PicturePlaces:
    """The ids that stand for pictures.

    Args:
        spec: What the model asks of its data.

    Attributes:
        looked_at: Whether words look at tiles: what stands for a tile is its tag, or a thumbnail's placeholders.

    Raises:
        UserError: If tiles have tags that the tokenizer cannot tell apart.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.tiling = Tiling.parse(spec.tiles)
        self.placeholders = [spec.image_token_id] * spec.tokens_per_image
        self.thumbnail = spec.thumbnail
        self.looked_at = bool(self.tiling.most) and (self.thumbnail or not self.placeholders)
        self.sounds = (spec.image_token_id + 1,) * spec.tokens_per_sound
        self.ids = cache(self._ids)
        self._tags: dict[str, list[int]] = {}
        if self.tiling.most and self.tiling.tagged:
            for tag in tile_tags(self.tiling.most_squares, self.tiling.most):
                # Alone, so that no token of a tag reaches into what stands beside it.
                self._tags[tag] = spec.tokenizer(tag, add_special_tokens=False)["input_ids"]
            if len({tuple(ids) for ids in self._tags.values()}) < len(self._tags):
                raise UserError(
                    f"Expected a tokenizer that tells the tags of tiles apart, got the same ids for several of "
                    f"{', '.join(self._tags)}. Add their words to it, or set `encoder.features.tiles` to "
                    f"`{self.tiling.most}:untagged`."
                )

    def _ids(self, squares: int) -> tuple[int, ...]:
        """Returns the ids of a picture.

        Args:
            squares: Its tiles, thumbnail included.
        """
        if not self._tags:
            return tuple(self.placeholders * squares)
        return tuple(token for tag in self._named(squares) for token in (*self._tags[tag], *self.placeholders))

    def sound(self) -> tuple[int, ...]:
        """Returns the ids of a sound.

        Raises:
            UserError: If the model does not hear.
        """
        if not self.sounds:
            raise UserError(
                f"Expected text and pictures for a model that does not hear, got a `{SOUND_MARK}`. Give the model "
                "`hearing`, or leave the sample out."
            )
        return self.sounds

    def owners(self, squares: int, before: int) -> list[int]:
        """Returns the number of the tile that each of a picture's ids stands for.

        Args:
            squares: As in `ids`.
            before: How many tiles stand before it in the sample.
        """
        if self.thumbnail:
            return [0] * len(self._tags[THUMBNAIL_TAG]) + [before + squares] * len(self.placeholders)
        sizes = [len(self._tags.get(tag, ())) + len(self.placeholders) for tag in self._named(squares)]
        return [before + number for number, size in enumerate(sizes, start=1) for _ in range(size)]

    def _named(self, squares: int) -> list[str]:
        return [THUMBNAIL_TAG] if self.thumbnail else tile_tags(squares, self.tiling.most)


def tag_table(tokenizer: PreTrainedTokenizerBase, tiling: Tiling) -> list[list[int]]:
    """Returns the ids of the tags of all tiles but the thumbnail, in their order, -1 behind those of shorter ones."""
    tags = tile_tags(tiling.most_squares, tiling.most)[:-1]
    rows = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in tags]
    longest = max(map(len, rows), default=0)
    return [row + [-1] * (longest - len(row)) for row in rows]


def marked_pieces(text: str) -> list[tuple[str, str]]:
    """Cuts a text at the marks of images and sounds.

    Returns:
        Each piece with the mark before it; the first has none.
    """
    first, *rest = re.split(f"({IMAGE_MARK}|{SOUND_MARK})", text)
    return [("", first), *zip(rest[::2], rest[1::2], strict=True)]


def tile_names(name: str, squares: int) -> list[str]:
    """Returns names of a picture's tiles, by which their features are kept; a single one has the picture's own."""
    return [name] if squares == 1 else [f"{name}.{number}" for number in range(squares)]
