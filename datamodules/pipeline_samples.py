"""What a pipeline of the user's own yields, encoded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.bad_samples import BadSample, Placeholder, bad_samples_of, placeholder
from datamodules.dataset import Delivery, Failure
from datamodules.foreign import conversations_of
from datamodules.members import Member, image_order, is_image, is_sound, is_used
from moextend_pl.contracts import Sample, UserError
from moextend_pl.samples.collate import collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, content_name, decode_image, decoded
from moextend_pl.samples.sound.features import SoundTransform, with_sounds
from moextend_pl.samples.turns import parse_turns

CONVERSATIONS, KEY, PLACE = "conversations", "__key__", "__url__"
PICTURES = ("image", "images")


class PipelineSamples(IterableDataset[Any]):
    """Encodes what a pipeline yields, without end.

    Args:
        make: Returns the pipeline, which yields samples.
        encoder: Conversation -> ids and labels.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], encoder: ConversationEncoder) -> None:
        self.make, self.pipeline = make, make()
        self.encoder = encoder
        self.transform, self.listen = PixelTransform(encoder.spec), SoundTransform(encoder.spec)

    def __iter__(self) -> Iterator[Sample | Failure]:
        for round_ in itertools.count():
            usable = False
            for number, sample in enumerate(self._own()):
                encoded = self._encoded(sample, f"{round_}-{number}")
                usable |= not isinstance(encoded, Placeholder)
                yield encoded
            if not usable:
                yield Failure(
                    "The pipeline of the training set yields no sample that can be used (to this worker, where there "
                    "are several). Look at the function that makes it, or lower `reading.num_workers`."
                )
                return
            if isinstance(self.pipeline, Iterator):  # which yields nothing more
                self.pipeline = self.make()

    def _own(self) -> Iterable[Any]:
        """Returns the samples of this worker."""
        worker = get_worker_info()
        if worker is None or isinstance(self.pipeline, IterableDataset):
            return self.pipeline
        return itertools.islice(self.pipeline, worker.id, None, worker.num_workers)

    def _encoded(self, sample: Any, number: str) -> Sample | Failure:
        if not isinstance(sample, Mapping):
            return Failure(
                f"Expected samples as mappings from the pipeline of the training set, got {type(sample).__name__}. "
                "Leave out `to_tuple` and `batched`."
            )
        place, key = str(sample.get(PLACE, "pipeline")), str(sample.get(KEY, number))
        try:
            return self._encode(sample, key, f"{place}: {key}")
        except UserError as error:
            reason = str(error).removeprefix(f"{place}: {key}: ")
            return placeholder(self.encoder.filler(), BadSample(place, key, reason))

    def _encode(self, sample: Mapping[str, Any], key: str, origin: str) -> Sample:
        pictures, sounds = pictures_of(sample), sounds_of(sample, origin)
        images = [decode_image(p, origin) if isinstance(p, bytes) else decoded(p, origin) for p in pictures]
        names = [_picture_name(*pair) for pair in zip(pictures, images, strict=True)]
        turns = parse_turns(conversations_of(texts_of(sample), len(images), origin), len(images), origin, len(sounds))
        encoded = self.encoder.encode(key, turns, [self.transform(image) for image in images], names)
        heard = [content_name(data) for data in sounds]
        return with_sounds(encoded, self.encoder.spec, [self.listen(data, origin) for data in sounds], heard)

    def collate(self, samples: list[Any]) -> Delivery | Failure:
        """Pads and stacks, and says which samples were bad; lets a failure pass."""
        failure = next((each for each in samples if isinstance(each, Failure)), None)
        return failure or Delivery(collate_training(samples, self.encoder.pad_id), bad_samples_of(samples))


def pictures_of(sample: Mapping[str, Any]) -> list[bytes | Image.Image]:
    """Returns the pictures of a sample in their order, each a file's content or decoded.

    Raises:
        UserError: If one is something else.
    """
    found = [value for name in PICTURES for value in _listed(sample.get(name))]
    named = [Member(name, 0, 0) for name in sample if is_used(name) and is_image(name)]
    found += [sample[member.extension] for member in sorted(named, key=image_order)]
    for picture in found:
        if not isinstance(picture, bytes | Image.Image):
            raise UserError(
                f"expected pictures as bytes or PIL images, got {type(picture).__name__}. With webdataset use "
                '`decode("pil")`, or no `decode`.'
            )
    return found


def sounds_of(sample: Mapping[str, Any], origin: str) -> list[bytes]:
    """Returns the sounds of a sample in their order, as files.

    Raises:
        UserError: If one is something else.
    """
    named = [Member(name, 0, 0) for name in sample if is_used(name) and is_sound(name)]
    found = [sample[member.extension] for member in sorted(named, key=image_order)]
    if wrong := [type(sound).__name__ for sound in found if not isinstance(sound, bytes)]:
        raise UserError(f"{origin}: expected sounds as bytes of files, got {wrong[0]}. Leave them as they are read.")
    return found


def _picture_name(picture: bytes | Image.Image, image_HW3: Image.Image) -> str:
    """Names a picture by all that makes its pixels: of one that comes decoded, the bytes alone have no shape."""
    content = picture if isinstance(picture, bytes) else f"{image_HW3.size}".encode() + image_HW3.tobytes()
    return content_name(content)


def texts_of(sample: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the texts of a sample as files would hold them."""
    found = {name: sample[name] for name in ("json", "txt") if name in sample}
    if CONVERSATIONS in sample:
        found = {"json": {CONVERSATIONS: sample[CONVERSATIONS]}}
    return {name: value if isinstance(value, bytes) else _written(name, value) for name, value in found.items()}


def _written(name: str, value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value) if name == "json" else str(value)
    return text.encode("utf-8", "surrogatepass")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
