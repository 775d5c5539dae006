"""Conversation -> ids and labels: the only place that knows placeholders and label masks.

What is learned follows from the chat template, see `templates.answer_spans`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from moextend_pl.contracts import IGNORE_INDEX, Sample, SampleSpec, UserError
from moextend_pl.samples.control_tokens import Disguise, control_strings
from moextend_pl.samples.templates import answer_spans
from moextend_pl.samples.tiling.tags import PicturePlaces, marked_pieces, tile_names
from moextend_pl.samples.turns import IMAGE_MARK, SOUND_MARK, Turn, without_marks

CACHED_TEXTS, CACHED_CHARACTERS = 16_384, 512
"""Short texts repeat; long ones do not, and remembering them would fill the memory of every worker."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text.

    Attributes:
        text: What the chat template made of it; images still stand as `<image>`, sounds as `<sound>`.
        answers: (start, end) of each learned span, in characters.
        breaks: Places that no token may lie across.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    breaks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids; every image stands as its placeholders.

    Attributes:
        ids: S ids.
        labels: S labels.
        images: How many images the ids hold; fewer than the conversation has if it was truncated.
        supervised: Whether any label is left to learn.
        tiles: S numbers of the tile that each id stands for, from 1; 0 for text; None where none is looked at.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: int
    supervised: bool
    tiles: torch.Tensor | None


class ConversationEncoder:
    """Turns conversations and pixels into samples.

    Args:
        spec: What the model asks of its data.
        max_length: Longest sequence, in positions; None for the model's context.

    Raises:
        UserError: If the tokenizer has no chat template, or `max_length` is not positive.
    """

    def __init__(self, spec: SampleSpec, max_length: int | None = None) -> None:
        if not spec.tokenizer.chat_template:
            raise UserError(
                "Expected a tokenizer with a chat template, got one without. Set `chat_template` of the language model "
                "to `inst` or to a file with a Jinja template."
            )
        if max_length is not None and max_length < 1:
            raise UserError(
                f"Expected `max_length` of at least 1, got {max_length}. Raise it, or give null: the model's context."
            )
        self.spec = spec
        self.max_length = spec.context if max_length is None else max_length
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def encode(self, key: str, turns: tuple[Turn, ...], pixels: Sequence[torch.Tensor], names: Sequence[str]) -> Sample:
        """Encodes a conversation for training or for measuring a loss.

        Args:
            key: Name of the sample.
            turns: All questions and answers.
            pixels: I images in the order of their `<image>`, each (3, H, W), or (T, 3, H, W) as tiles.
            names: I names of the images.

        Raises:
            UserError: If the template cannot be used, or nothing is left to learn.
        """
        encoded = self._encode(turns, _tiles(pixels))
        if not encoded.supervised:
            raise UserError(
                f"Sample {key!r}: no supervised token is left within `max_length={self.max_length}`. Raise it, or "
                "leave the sample out."
            )
        return self._sample(key, encoded, pixels, names, "", "")

    def encode_prompt(
        self, key: str, turns: tuple[Turn, ...], pixels: Sequence[torch.Tensor], names: Sequence[str]
    ) -> Sample:
        """Encodes, as `encode`, everything left of the last answer, for generation; labels are all ignored.

        Raises:
            UserError: If the template cannot be used, or the prompt is longer than `max_length`.
        """
        encoded = self._encode_prompt(turns, _tiles(pixels))
        if self.max_length is not None and len(encoded.ids) > self.max_length:
            raise UserError(
                f"Sample {key!r}: expected a prompt of at most `max_length={self.max_length}`, got "
                f"{len(encoded.ids)} positions; a cut prompt would ask something else. Raise it."
            )
        question = without_marks(turns[-1].human).strip()
        return self._sample(key, encoded, pixels, names, question, turns[-1].gpt)

    def length(self, turns: tuple[Turn, ...], tiles: tuple[int, ...] = ()) -> int:
        """Returns how many positions a conversation takes when it is encoded for training.

        Args:
            turns: All questions and answers.
            tiles: How many each image has, thumbnails included; by default one.

        Raises:
            UserError: If the template cannot be used.
        """
        return len(self._encode(turns, tiles).ids)

    def encode_text(self, text: str, tiles: tuple[int, ...] = ()) -> Encoded:
        """Encodes a text that a chat template made, with placeholders where `<image>` stands."""
        return self._expand(Rendered(text, ()), tiles, truncate=False)

    def prompt_length(self, turns: tuple[Turn, ...], tiles: tuple[int, ...] = ()) -> int:
        """Returns how many positions everything left of the last answer takes; arguments as of `length`."""
        return len(self._encode_prompt(turns, tiles).ids)

    def filler(self) -> Sample:
        """Returns the sample that stands where a rank has none left: empty key, nothing to learn."""
        ids = torch.tensor([self.pad_id])
        size = self.spec.image_size
        return Sample("", ids, torch.full_like(ids, IGNORE_INDEX), torch.zeros(0, 3, size, size), [])

    @property
    def pad_id(self) -> int:
        """Id of padding; the end token's where a tokenizer has none, which is masked all the same."""
        tokenizer = self.spec.tokenizer
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def render(self, turns: tuple[Turn, ...]) -> Rendered:
        """Renders a conversation and finds its answers.

        Raises:
            UserError: If the template is not usable: it refuses, drops images, or changes what stands before answers.
        """
        disguise = Disguise(turns, self._controls)
        text, answers = answer_spans(self.spec.tokenizer, disguise.turns)
        text, breaks, moved = disguise.reveal(text)
        for mark in (IMAGE_MARK, SOUND_MARK):
            if text.count(mark) != sum(turn.human.count(mark) for turn in turns):
                raise UserError(f"Expected a chat template that keeps every `{mark}` of the text, got: {text!r}.")
        return Rendered(text, tuple((moved(start), moved(end)) for start, end in answers), breaks)

    def _forget(self) -> None:
        """Sets up the caches, which are not pickled; sets of short questions repeat the same texts."""
        self._controls, self._places = control_strings(self.spec.tokenizer), PicturePlaces(self.spec)
        self._encode = _remembering(self._encode_uncached)
        self._encode_prompt = _remembering(self._encode_prompt_uncached)

    def _encode_uncached(self, turns: tuple[Turn, ...], tiles: tuple[int, ...]) -> Encoded:
        return self._expand(self.render(turns), tiles)

    def _encode_prompt_uncached(self, turns: tuple[Turn, ...], tiles: tuple[int, ...]) -> Encoded:
        rendered = self.render(turns)
        prompt = rendered.text[: rendered.answers[-1][0]]
        encoded = self._expand(replace(rendered, text=prompt, answers=rendered.answers[:-1]), tiles, truncate=False)
        return replace(encoded, labels=torch.full_like(encoded.ids, IGNORE_INDEX), supervised=False)

    def _expand(self, rendered: Rendered, tiles: tuple[int, ...], truncate: bool = True) -> Encoded:
        """Tokenises the text between images and sounds, and puts placeholders where they are."""
        limit = self.max_length if truncate and self.max_length is not None else None
        ids: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        images = start = 0
        for mark, piece in marked_pieces(rendered.text):
            if mark:
                is_sound, count = mark == SOUND_MARK, tiles[images] if tiles and mark == IMAGE_MARK else 1
                places = self._places.sound() if is_sound else self._places.ids(count)
                if limit is not None and len(ids) + len(places) > limit:
                    break  # a cut image would be noise: the text ends before it
                ids += places
                owners += [0] * len(places) if is_sound else self._places.owners(count, max(owners, default=0))
                labels += [IGNORE_INDEX] * len(places)
                images += not is_sound
            start += len(mark)
            answers = [(first - start, last - start) for first, last in rendered.answers]
            piece_ids, learned = self._tokenise(piece, answers, [place - start for place in rendered.breaks])
            ids += piece_ids
            owners += [0] * len(piece_ids)
            labels += [token if learn else IGNORE_INDEX for token, learn in zip(piece_ids, learned, strict=True)]
            start += len(piece)
            if limit is not None and len(ids) >= limit:
                break
        supervised = any(label != IGNORE_INDEX for label in labels[:limit])
        ids_S, labels_S, owners_S = (torch.tensor(each[:limit]) for each in (ids, labels, owners))
        return Encoded(ids_S, labels_S, images, supervised, owners_S if self._places.looked_at else None)

    def _tokenise(self, piece: str, answers: list[tuple[int, int]], breaks: list[int]) -> tuple[list[int], list[bool]]:
        """Returns ids of a text, and which of them lie inside an answer.

        The text is tokenised as a whole, as it was when the language model was trained. Only where a token would lie
        across the border of an answer or another break, the two sides of it are tokenised alone, which is what
        generation does; and at all of them where a tokenizer cannot tell where its tokens lie.
        """
        if not piece:
            return [], []
        places = {*breaks, *(border for pair in answers for border in pair)}
        borders = sorted(place for place in places if 0 < place < len(piece))

        def inside(place: int) -> bool:
            return any(start <= place < end for start, end in answers)

        tokenizer = self.spec.tokenizer
        options = {"add_special_tokens": False, **({"return_offsets_mapping": True} if tokenizer.is_fast else {})}
        cuts = set() if tokenizer.is_fast else set(borders)
        while True:
            ids: list[int] = []
            spans: list[tuple[int, int]] = []
            for first, last in pairwise([0, *sorted(cuts), len(piece)]):
                part = tokenizer(piece[first:last], **options)
                ids += part["input_ids"]
                offsets = part.get("offset_mapping") or [(0, last - first)] * len(part["input_ids"])
                spans += [(first + start, first + end) for start, end in offsets]
            crossed = {border for border in borders if any(start < border < end for start, end in spans)}
            if not crossed:
                return ids, [inside(start) for start, _ in spans]
            cuts |= crossed

    def _sample(
        self,
        key: str,
        encoded: Encoded,
        pixels: Sequence[torch.Tensor],
        names: Sequence[str],
        prompt: str,
        answer: str,
    ) -> Sample:
        kept = list(pixels[: encoded.images])
        squares = _tiles(kept)
        shown = zip(names[: encoded.images], squares, strict=True)
        # Clones: the cached tensors must survive whatever is done to a sample.
        return Sample(
            key=key,
            input_ids=encoded.ids.clone(),
            labels=encoded.labels.clone(),
            pixel_values=_stack(kept, self.spec.image_size),
            image_keys=[key for name, count in shown for key in tile_names(name, count)],
            prompt=prompt,
            answer=answer,
            tiles=None if encoded.tiles is None else encoded.tiles.clone(),
        )


_Encode = Callable[[tuple[Turn, ...], tuple[int, ...]], Encoded]


def _remembering(encode: _Encode) -> _Encode:
    cached = lru_cache(maxsize=CACHED_TEXTS)(encode)

    def remembered(turns: tuple[Turn, ...], tiles: tuple[int, ...]) -> Encoded:
        characters = sum(len(turn.system) + len(turn.human) + len(turn.gpt) for turn in turns)
        return (cached if characters <= CACHED_CHARACTERS else encode)(turns, tiles)

    return remembered


def _tiles(pixels: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Returns how many squares each image is."""
    return tuple(len(image) if image.dim() == 4 else 1 for image in pixels)


def _stack(pixels: list[torch.Tensor], side: int) -> torch.Tensor:
    squares = [image if image.dim() == 4 else image[None] for image in pixels]
    if len(squares) == 1:
        return squares[0]  # no copy in the common case
    return torch.cat(squares) if squares else torch.zeros(0, 3, side, side)
