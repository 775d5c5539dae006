"""The model card of an exported run: what it was made from, how, how well it does, and how to use and cite it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import yaml

from moextend_pl.contracts import ExtensionPlan
from moextend_pl.runs.atomic import read_json, write_text
from moextend_pl.runs.manifest import Manifest
from moextend_pl.runs.named import name_of
from moextend_pl.runs.plain_yaml import read_yaml

CARD = "README.md"
PLOTS = "plots"
CITE = """```bibtex
@misc{moextend, title={MoExtend: Tuning New Experts for Modality and Task Extension},
  author={Shanshan Zhong and Shanghua Gao and Zhongzhan Huang and Wushao Wen and Marinka Zitnik and Pan Zhou},
  year={2024}, eprint={2408.03511}, archivePrefix={arXiv}}
@misc{cumo, title={CuMo: Scaling Multimodal LLM with Co-Upcycled Mixture-of-Experts},
  author={Jiachen Li and Xinyao Wang and Sijie Zhu and Chia-Wen Kuo and Lu Xu and Fan Chen and Jitesh Jain and
  Humphrey Shi and Longyin Wen}, year={2024}, eprint={2405.05949}, archivePrefix={arXiv}}
```"""


def write_card(manifest: Manifest, folder: Path, use: str, base: str | None = None) -> None:
    """Writes the card, with the plots of the run beside it.

    Args:
        manifest: Of the run.
        folder: Exported folder.
        use: How it is loaded, as Markdown.
        base: Name of the base; by default as its folder tells.
    """
    run, name = manifest.run, base or name_of(manifest.folder("language"))[0]
    plots = sorted((run / PLOTS).glob("*.png"))
    for plot in plots:
        (folder / PLOTS).mkdir(exist_ok=True)
        shutil.copy(plot, folder / PLOTS / plot.name)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["moextend", "mixture-of-experts"],
        **({"base_model": name} if "/" in name else {}),
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}, extended to see\n\n{_what(manifest, name)}",
        f"## Use\n\n{use}",
        f"## Plan\n\n{_plans(manifest.plans)}",
        f"## Data\n\n{_data(run / 'config.yaml')}",
        f"## Metrics\n\n{_metrics(run / 'metrics.csv')}",
        f"## Receipts\n\n{_receipts(manifest)}",
        *([f"## Plots\n\n{_pictures(plots)}"] if plots else []),
        f"## Cite\n\n{CITE}",
    ]
    write_text(folder / CARD, "\n\n".join(sections) + "\n")


def _what(manifest: Manifest, name: str) -> str:
    tower = manifest.folder("encoder").name
    return (
        f"Tower `{tower}`, a projector and the language model `{name}`; {len(manifest.frozen)} tensors are frozen and "
        f"those of the base. Made by moextend_pl; weights are {manifest.dtype}."
    )


def _plans(plans: tuple[ExtensionPlan, ...]) -> str:
    if not plans:
        return "No expert was added."
    lines = []
    for plan in plans:
        task = f", task `{plan.task}`" if plan.task else ""
        lines.append(f"Init `{plan.init}`, routing `{plan.routing}`, calibration `{plan.calibration}`{task}:")
        lines += [
            f"- layer {growth.layer}: new experts from {', '.join(map(str, growth.sources))}" for growth in plan.layers
        ]
    return "\n".join(lines)


def _data(config: Path) -> str:
    """Returns the names of the shard sets of a run; where they lie is nobody's business."""
    try:
        data = read_yaml(config.read_text(encoding="utf-8"))["data"]["init_args"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "Not told by the run."
    sets = [f"- {split}: {', '.join(_names(data[split]))}" for split in ("train", "val", "test") if data.get(split)]
    return "\n".join(sets) or "Not told by the run."


def _names(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for key in ("path", "name", "init_args") if key in value for name in _names(value[key])] or [
            name for each in value.values() for name in _names(each)
        ]
    if isinstance(value, list):
        return [name for each in value for name in _names(each)]
    return [f"`{'/'.join(Path(value).parts[-2:])}`"] if isinstance(value, str) else []


def _metrics(table: Path) -> str:
    """Returns the last value of each metric but learning rates."""
    last: dict[str, str] = {}
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                last.update({name: value for name, value in row.items() if name and value})
    shown = {name: value for name, value in last.items() if name.startswith(("train/", "val/", "test/"))}
    if not shown:
        return "None were logged."
    return "\n".join(["| metric | last |", "|---|---|", *(f"| {name} | {shown[name]} |" for name in sorted(shown))])


def _receipts(manifest: Manifest) -> str:
    stage, frozen = read_json(manifest.run / "stage.json"), read_json(manifest.run / "frozen.json")
    lines = [f"- delta: SHA-256 `{manifest.delta_sha256}`"]
    if stage:
        lines.append(f"- {stage.get('steps')} steps in {stage.get('seconds')} seconds")
    if frozen.get("unchanged"):
        lines.append(f"- all {frozen.get('tensors')} frozen tensors were the same bytes before and after")
    lines.append(f"- {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    return "\n".join(lines)


def _pictures(plots: list[Path]) -> str:
    return "\n\n".join(f"![{plot.stem}]({PLOTS}/{plot.name})" for plot in plots)
