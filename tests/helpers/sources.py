"""Changes files that a run was made from, as an edit or another version of a base would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.tiny_world import TinyWorld


def copied(world: TinyWorld, folder: Path) -> TinyWorld:
    """Returns a copy of a tiny world that may be changed."""
    return TinyWorld(shutil.copytree(world.root, folder / "world"))


def change_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def swap_words(path: Path) -> None:
    """Swaps the ids of two words of a tokenizer."""
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(data))


def add_word(path: Path) -> None:
    """Adds a word to a tokenizer."""
    data = json.loads(path.read_text())
    data["model"]["vocab"]["purple"] = len(data["model"]["vocab"])
    path.write_text(json.dumps(data))


CHANGES = {
    "top-k": (lambda w: change_json(w.base / "config.json", num_experts_per_tok=1), "num_experts_per_tok was 2, now 1"),
    "eps": (lambda w: change_json(w.base / "config.json", rms_norm_eps=0.01), "rms_norm_eps was 1e-05, now 0.01"),
    "words swapped": (lambda w: swap_words(w.base / "tokenizer.json"), r"language/tokenizer\.json was \w{16}, now"),
    "words added": (lambda w: add_word(w.base / "tokenizer.json"), r"language/tokenizer\.json was \w{16}, now"),
    "end token": (
        lambda w: change_json(w.base / "tokenizer_config.json", eos_token="<unk>"),
        r"tokenizer_config\.json: eos_token was </s>, now <unk>",
    ),
    "tower": (lambda w: change_json(w.encoder / "encoder.json", pool=1), r"encoder/encoder\.json: pool was 2, now 1"),
}
"""Name -> (what changes a world, what the sentence says)."""
