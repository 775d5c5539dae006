"""Run directories of this project to the published layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from moextend_pl.atomic import write_json
from moextend_pl.checkpoint import DELTA_FILE
from moextend_pl.contracts import UserError
from moextend_pl.convert.entries import Entry, check_names, clip_entries, projector_entries, same
from moextend_pl.convert.files import TensorFiles, write_shards, write_tensors
from moextend_pl.convert.incoming import PUBLISHED_CONFIG, REPORT
from moextend_pl.convert.published import (
    OURS_TOWER,
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    extension_entries,
    language_entries,
)
from moextend_pl.encoder import WEIGHTS_FILE
from moextend_pl.manifest import Manifest, read_manifest


def convert_out(source: Path, target: Path, layout: str) -> dict[str, Any]:
    """Writes a run in a published layout: a whole model, or `clip.bin` or `mm_projector.bin` of one part.

    Args:
        source: Run directory, converted or trained here.
        target: Folder to make.
        layout: `cumo` or `moextend`.

    Returns:
        The report: what every tensor became.

    Raises:
        UserError: If the run holds what the layout has no place for.
    """
    manifest = read_manifest(source)
    delta = load_file(source / DELTA_FILE)
    tower = _tower(manifest, delta)
    whole = "language" in manifest.model
    entries = _tower_entries(tower, manifest, layout, whole)
    experts = ((manifest.model.get("projector") or {}).get("upcycle") or {}).get("experts", 0)
    if "projector" in manifest.model:
        entries += projector_entries(experts, PROJECTOR_PREFIX[layout], "projector.")
    language: list[Entry] = []
    if whole:
        config = AutoConfig.from_pretrained(manifest.folder("language"), local_files_only=True)
        if len(manifest.plans) > 1:
            raise UserError(
                f"{source} was extended {len(manifest.plans)} times; the published layout has place for one."
            )
        grown = manifest.plans[0].layers if manifest.plans else ()
        language = language_entries(config, [growth.layer for growth in grown])
        for growth in grown:
            entries += extension_entries(growth.layer, config.num_local_experts, len(growth.sources))
    have = {**tower, **{name: t for name, t in delta.items() if not name.startswith(OURS_TOWER)}}
    learned = {entry.ours for entry in language} & have.keys()
    check_names((entry.ours for entry in entries), have.keys() - learned, str(source))
    target.mkdir(parents=True, exist_ok=True)
    if whole:
        write_shards(_whole_model(manifest, entries, language, have), target)
        _copy_config(source, manifest, target)
    else:
        tensors = {name: t for entry in entries for name, t in entry.split(have[entry.ours]).items()}
        write_tensors(tensors, target / ("clip.bin" if tower else "mm_projector.bin"))
    report = {"layout": layout, "from": source.name, "tensors": [entry.line() for entry in (*entries, *language)]}
    write_json(target / REPORT, report)
    return report


def _tower(manifest: Manifest, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the tower: those of its files, and what the run learned in their place."""
    if "encoder" not in manifest.model:
        return {}
    stored = load_file(manifest.folder("encoder") / WEIGHTS_FILE)
    tensors = {OURS_TOWER + name: tensor for name, tensor in stored.items()}
    learned = {name: tensor for name, tensor in delta.items() if name.startswith(OURS_TOWER)}
    for name in learned:
        block, found, _ = name.partition("mlp.experts.")
        if found:  # the dense MLP whose place the experts took
            tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{block}mlp.fc")}
    return {**tensors, **learned}


def _tower_entries(tower: Mapping[str, Tensor], manifest: Manifest, layout: str, whole: bool) -> list[Entry]:
    if not tower:
        return []
    experts = (manifest.model["encoder"].get("upcycle") or {}).get("experts", 0)
    if experts and layout != "cumo":
        raise UserError(f"{manifest.run}: the tower is upcycled, for which the layout {layout} has no place. Use cumo.")
    prefix = TOWER_PREFIX[layout] if whole else "vision_model."
    layers = len([name for name in tower if name.endswith("self_attn.q_proj.weight")])
    entries = clip_entries(layers, experts, prefix, OURS_TOWER)
    last = [name for name in tower if name.startswith(f"{OURS_TOWER}post_layernorm.")]
    return entries + [same(name, prefix + name.removeprefix(OURS_TOWER)) for name in last]


def _whole_model(
    manifest: Manifest, entries: list[Entry], language: list[Entry], have: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        yield from entry.split(have[entry.ours]).items()
    files = TensorFiles(manifest.folder("language"))
    check_names((name for entry in language for name in entry.names), files, str(files.path))
    for entry in language:
        if entry.ours in have:
            yield from entry.split(have[entry.ours]).items()
        else:
            yield from ((name, files[name]) for name in entry.names)


def _copy_config(source: Path, manifest: Manifest, target: Path) -> None:
    published = source / PUBLISHED_CONFIG
    file = published if published.is_file() else manifest.folder("language") / "config.json"
    write_json(target / "config.json", json.loads(file.read_text(encoding="utf-8")))
