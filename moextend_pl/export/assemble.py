"""`python -m moextend_pl assemble`: dense models of one base to one mixture, an expert each."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moextend_pl.contracts import UpcycleSpec, UserError
from moextend_pl.export.command import check_new
from moextend_pl.runs.atomic import write_folder, write_json
from moextend_pl.runs.named import name_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moextend_pl.convert.files import TensorFiles

log = logging.getLogger(__name__)
RECORD, GENERATION = "assembly.json", "generation_config.json"


def main(argv: Sequence[str]) -> int:
    """Writes the mixture as a folder of transformers.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl assemble", description=__doc__)
    parser.add_argument("--sources", nargs="+", required=True, help="folders, org/name of a hub, or GGUF files")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--top-k", type=int, default=2, help="experts for each token")
    parser.add_argument("--seed", type=int, default=0, help="of the routers, which have to learn")
    parser.add_argument("--keep-first", action="store_true", help="where sources differ outside of their MLPs")
    options = parser.parse_args(argv)
    if len(options.sources) < 2:
        raise UserError(f"Expected two `--sources` or more, got {len(options.sources)}. Name one for each expert.")
    if not 2 <= options.top_k <= len(options.sources):
        raise UserError(
            f"Expected `--top-k` in 2..{len(options.sources)} (the sources), got {options.top_k}. One expert alone has "
            "the weight 1 whatever its router says, which then learns nothing from what the model predicts."
        )
    check_new(options.out)
    spec = UpcycleSpec(experts=len(options.sources), top_k=options.top_k, seed=options.seed)
    _assemble(options.sources, options.out, spec, options.keep_first)
    log.info("%s holds a Mixtral of %d experts, whose routers have to learn", options.out, spec.experts)
    return 0


def _assemble(names: list[str], out: Path, spec: UpcycleSpec, keep_first: bool) -> None:
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.convert.assembly import assembled, check_configurations, check_tensors
    from moextend_pl.convert.files import TensorFiles, write_shards
    from moextend_pl.models.model_folder import base_folder, mixtral_config, read_config
    from moextend_pl.runs.fingerprints import check_weights

    folders = [Path(base_folder(name)) for name in names]
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"Expected the folder of a dense language model as source, got {folder}, without a config.json. Name "
                "what transformers or SavePretrained wrote; a delta belongs to a mixture that there is already."
            )
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds an adapter, which would be left out. Merge it into the model first.")
        check_weights(folder)
    # A source may be named twice: the number keeps the two apart.
    labels = [f"source {number} ({folder})" for number, folder in enumerate(folders)]
    config = read_config(str(folders[0]))
    check_configurations({label: read_config(str(f)) for label, f in zip(labels, folders, strict=True)}, spec)
    sources = [TensorFiles(folder) for folder in folders]
    check_tensors(dict(zip(labels, sources, strict=True)), config.num_hidden_layers)
    tokenizer = _one_tokenizer(folders)
    differ = _differences(sources, keep_first)

    def write(place: Path) -> None:
        write_shards(assembled(sources, spec), place)
        mixtral_config(config, spec).save_pretrained(place)
        tokenizer.save_pretrained(place)
        if (folders[0] / GENERATION).is_file():
            shutil.copyfile(folders[0] / GENERATION, place / GENERATION)
        experts = [name_of(folder)[0] for folder in folders]
        write_json(place / RECORD, {"experts": experts, "shared": experts[0], "differ": differ, "seed": spec.seed})

    write_folder(out, write)


def _one_tokenizer(folders: list[Path]) -> PreTrainedTokenizerBase:
    from moextend_pl.samples.templates import load_tokenizer

    first, *others = (load_tokenizer(str(folder), None) for folder in folders)
    for folder, tokenizer in zip(folders[1:], others, strict=True):
        if tokenizer.get_vocab() != first.get_vocab():
            raise UserError(
                f"Expected one vocabulary, got another one in {folder} than in {folders[0]}. Leave one of them out."
            )
    return first


def _differences(sources: list[TensorFiles], keep_first: bool) -> list[str]:
    from moextend_pl.convert.assembly import differences

    differ = differences(sources)
    if differ and not keep_first:
        raise UserError(
            f"Expected sources that differ in their MLPs only, got {len(differ)} other tensors that differ, for "
            f"example {min(differ)}: an expert would not be its source. Train MLPs alone, or take the first source's "
            "by `--keep-first`."
        )
    if differ:
        log.warning("%d tensors outside of MLPs differ; experts stand among those of the first source", len(differ))
    return differ
