"""One sample for people: its conversation, its tokens with the label mask, its pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from datamodules.audit import load_spec
from datamodules.reader import RawSample, ShardReader
from moextend_pl.contracts import IGNORE_INDEX, Sample, SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import decode_image, open_image
from moextend_pl.samples.sound.waveform import sound_suffix
from moextend_pl.samples.turns import IMAGE_MARK, SOUND_MARK

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def find_sample(place: str | Path, key: str) -> RawSample:
    """Reads the sample with a key.

    Raises:
        UserError: If there is none.
    """
    reader = ShardReader(place)
    number = reader.find(key)
    if number is None:
        some = ", ".join(reader.shards[0].keys[:3])
        raise UserError(f"Expected a key of {place}, such as {some}; got {key!r}.")
    return reader.read(number)


def describe_sample(raw: RawSample) -> list[str]:
    """Returns where a sample lies, its images, its sounds and its turns."""
    lines = [raw.origin]
    for position, data in enumerate(raw.images):
        image = open_image(data, raw.origin)
        lines.append(
            f"image {position}: {image.format} {image.size[0]} x {image.size[1]} {image.mode}, {len(data)} bytes"
        )
    for position, data in enumerate(raw.sounds):
        lines.append(f"sound {position}: {sound_suffix(data, raw.origin).upper()}, {len(data)} bytes")
    return lines + [f"human: {turn.human}\ngpt:   {turn.gpt}" for turn in raw.turns]


def describe_labels(
    raw: RawSample, tokenizer: Path, tokens_per_image: int, max_length: int | None, colour: bool
) -> list[str]:
    """Returns the ids; learned ones are green, or stand in brackets where there is no colour."""
    spec = load_spec(tokenizer, tokens_per_image)
    sample = ConversationEncoder(spec, max_length).encode(raw.key, raw.turns, [], [])
    learned = int((sample.labels != IGNORE_INDEX).sum())
    how = "green" if colour else "in [brackets]"
    return [f"ids: {len(sample.input_ids)}, learned: {learned} ({how})", " ".join(_marked(sample, spec, colour))]


def save_picture(raw: RawSample, path: Path) -> str:
    """Writes the images of a sample side by side as one PNG; returns what was written.

    Raises:
        UserError: If the sample has none, or the file cannot be written.
    """
    if not raw.images:
        raise UserError(f"{raw.origin}: has no image to write to {path}. Leave out --png.")
    images = [decode_image(data, raw.origin) for data in raw.images]
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"Expected to write {path}, got: {error.strerror}.") from error
    return f"{path}: {len(images)} image(s), {sheet.width} x {sheet.height}"


def _marked(sample: Sample, spec: SampleSpec, colour: bool) -> list[str]:
    out: list[str] = []
    run = 0
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token >= spec.image_token_id:
            run += 1
            if position + 1 == len(ids) or ids[position + 1] != token:
                mark = IMAGE_MARK if token == spec.image_token_id else SOUND_MARK
                out.append(f"{GREY if colour else ''}{mark}*{run}{PLAIN if colour else ''}")
                run = 0
            continue
        text = f"{spec.tokenizer.convert_ids_to_tokens(token)}:{token}"
        if label == IGNORE_INDEX:
            out.append(f"{GREY}{text}{PLAIN}" if colour else text)
        else:
            out.append(f"{GREEN}{text}{PLAIN}" if colour else f"[{text}]")
    return out
