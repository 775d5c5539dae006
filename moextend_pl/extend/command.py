"""`python -m moextend_pl extend`: from own data to an extended model, by stage files to be edited."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_pl.cli.commands import run
from moextend_pl.contracts import PLAN_FILE, ExtensionPlan, LayerGrowth, UserError
from moextend_pl.extend.next_steps import next_steps
from moextend_pl.extend.own_data import count_samples, make_shards
from moextend_pl.extend.stage_files import STAGES, Wish
from moextend_pl.extend.stages import PARTS, PURPOSES, run_stages, write_stages
from moextend_pl.extend.timm_tower import save_timm_tower, timm_config

log = logging.getLogger(__name__)

SAVED_TOWER = "encoder.json"

LENGTH = 2048
"""Longest sequence in tokens, as LLaVA-1.5's; less where the base takes less."""


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command; further options `--trainer.*` go to every stage."""
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl extend",
        description="Makes shards of your data, writes the files of three stages (align, probe, extend) to OUT/configs "
        "and runs them. The same command goes on where a stopped one was; files that you edited stay as they are.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, help="language model with experts: a folder, a GGUF file, or org/name in a hub")
    add("--tower", required=True, help="vision tower of transformers or timm: a folder, or org/name in a hub")
    add("--data", type=Path, required=True, help="your data, as `shards build data` reads them, or a folder of shards")
    add("--val", type=Path, help="data to measure on, of any form (default: some of the pictures are held out)")
    add("--out", type=Path, required=True, help="folder of all that is written")
    add("--dry-run", action="store_true", help="make the shards, write the stage files and plan them; train nothing")
    add("--gpu", help="card to plan for, as for `plan`")
    add("--batch-size", type=int, default=16, help="samples of a step (default %(default)s)")
    add("--epochs", type=float, default=1.0, help="how often a sample is seen, at least (default %(default)s)")
    for name in ("images", "question", "columns"):
        add(f"--{name}", help="as for `shards build data`")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    options, overrides = options_parser().parse_known_args(argv)
    if unknown := [word for word in overrides if not (word.startswith("--trainer.") and "=" in word)]:
        raise UserError(f"extend does not accept {unknown[0]!r}; it takes --help and --trainer.KEY=VALUE.")
    if options.batch_size < 1 or not 0 < options.epochs < math.inf:
        raise UserError(
            f"Expected `--batch-size` and `--epochs` above 0, got {options.batch_size} and {options.epochs:g}."
        )
    # Models are looked at before hours go into data.
    base, tower = model_folder(options.base, "--base"), model_folder(options.tower, "--tower")
    facts = _facts(base)
    if timm := timm_config(tower):
        tower = save_timm_tower(tower, timm, options.out / "tower")
    log.info("[1/%d] data: shards of %s", PARTS, options.data)
    train, val = make_shards(options)
    wish = Wish(
        out=options.out,
        base=base,
        tower=tower,
        is_saved_tower=(tower / SAVED_TOWER).is_file(),
        train=train,
        val=val,
        samples=count_samples(train),
        batch=options.batch_size,
        epochs=options.epochs,
        **facts,
    )
    write_stages(wish)
    if options.dry_run:
        return _plan(wish, options.gpu)
    run_stages(wish, overrides)
    run(["report", str(wish.out)])
    log.info("the extended model is in %s; what you can do now:", wish.out / STAGES[-1])
    sys.stdout.write("".join(f"# {purpose}\n{line}\n" for purpose, line in next_steps(options.out)))
    return 0


def model_folder(name: str, option: str) -> Path:
    """Returns the folder of a model, fetched from a hub where no folder has the name.

    Args:
        name: Folder, GGUF file, or `org/name`; what is fetched has its commit in the folder's name, and so in the stage
            files.
        option: Who asks, for the error message.

    Raises:
        UserError: If there is neither.
    """
    from moextend_pl.models.model_folder import base_folder
    from moextend_pl.runs.named import CONFIGURATIONS

    folder = Path(base_folder(name))
    if not any((folder / file).is_file() for file in CONFIGURATIONS):
        raise UserError(
            f"Expected a model's folder or org/name of a hub for `{option}`, got {name!r}, in which there is none of "
            f"{', '.join(CONFIGURATIONS)}."
        )
    return folder


def _facts(base: Path) -> dict[str, Any]:
    """Returns width and longest sequence of a language model, and the precision in which it is trained here."""
    import torch

    from moextend_pl.models.model_folder import read_config

    config = read_config(str(base)).get_text_config()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {
        "width": int(config.hidden_size),
        "length": min(int(getattr(config, "max_position_embeddings", None) or LENGTH), LENGTH),
        "precision": "bf16-true" if on_gpu else "32-true",
    }


def _plan(wish: Wish, gpu: str | None) -> int:
    """Plans all stages; which layers grow is not known yet, so that the upper half of them stands for those."""
    from moextend_pl.models.model_folder import read_config

    layers = int(read_config(str(wish.base)).get_text_config().num_hidden_layers)
    growths = tuple(LayerGrowth(layer, (0,)) for layer in range(layers - max(layers // 2, 1), layers))
    ExtensionPlan(layers=growths).save(wish.out / "configs" / PLAN_FILE)
    for name in STAGES:
        sys.stdout.write(f"\n{name}: {PURPOSES[name]}\n")
        run(["plan", "--config", str(wish.out / "configs" / f"{name}.yaml"), *(["--gpu", gpu] if gpu else [])])
    return 0
