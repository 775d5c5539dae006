"""Measures the quickstart's models on the official test split and writes the report."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moextend_pl.cli.commands import run
from moextend_pl.contracts import PLAN_FILE, Batch, ExtensionPlan
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.dispatch import FROZEN_EXPERTS
from moextend_pl.quickstart.next_steps import EXAMPLE
from moextend_pl.reports import plots
from moextend_pl.reports.report_text import markdown
from moextend_pl.runs.atomic import read_json, write_json, write_text
from moextend_pl.runs.fingerprints import file_sha256, fingerprints
from moextend_pl.runs.manifest import DELTA_FILE, read_manifest

log = logging.getLogger(__name__)

REPORT, REPORT_DATA, MEASURED = "report.md", "report.json", "measured.json"
TRAINED = ("0_vision", "0_language", "1_align", "2_probe", "3_extend", "full_finetune")


def _accuracies(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.split("/")[1].removesuffix("_accuracy"): float(value)
        for name, value in metrics.items()
        if name.startswith("test/")
    }


def measure_stage(config: Path, *options: str) -> tuple[dict[str, float], Any]:
    """Lets the model of a stage answer its test sets by greedy generation.

    Returns:
        Exact-match accuracy by test set, and the finished command with its model and data.
    """
    command: Any = run(["test", "--config", str(config), "--trainer.logger=false", *options])
    return _accuracies(command.trainer.callback_metrics), command


def measure_open_routing(command: Any) -> float:
    """Answers the text test set while text, too, may reach new experts; pictures may in any case."""
    position = command.datamodule.test_names.index("text")
    loader = command.datamodule.test_dataloader()[position]
    command.model.language.open_to_text(True)
    (callback,) = [c for c in command.trainer.callbacks if type(c).__name__ == "WritePredictions"]
    command.trainer.callbacks.remove(callback)
    rows = [row for rows in command.trainer.predict(command.model, loader) for row in rows]
    command.model.language.open_to_text(False)
    return sum(row["correct"] for row in rows) / len(rows)


@torch.no_grad()
def text_logits_identical(model: MoExtend, base: Path, batches: Any) -> bool:
    """Returns whether every text logit equals that of the untouched base, bit for bit.

    The base is read anew by transformers alone.
    """
    stock = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.float32).eval()
    if model.language.compute.experts_implementation != FROZEN_EXPERTS:  # which equals the default of transformers
        stock.set_experts_implementation(model.language.compute.experts_implementation)
    model.eval()
    return all(_same_logits(model, stock, batch) for batch in batches)


def _same_logits(model: MoExtend, stock: Any, batch: Batch) -> bool:
    expected: Tensor = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.equal(model.language(batch, model.embed(batch)), expected)


def base_is_unchanged(run_directory: Path, base: Path) -> bool:
    """Returns whether the frozen tensors of a run are those of the base's files, bit for bit."""
    manifest = read_manifest(run_directory)
    prefix = "language.model."
    stock = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=manifest.torch_dtype)
    expected = {prefix + name: sha for name, sha in fingerprints(dict(stock.named_parameters())).items()}
    return all(manifest.frozen.get(name) == sha for name, sha in expected.items())


def measure_extended(out: Path, configs: Path) -> dict[str, Any]:
    """Measures base, aligned and extended model: the numbers of the report that do not depend on the baseline."""
    base, _ = measure_stage(configs / "0_language.yaml")
    pictures = json.dumps({"vqa": str(out / "data" / "vqa" / "test")})
    aligned, alignment = measure_stage(configs / "1_align.yaml", f"--data.init_args.test={pictures}")
    extended, command = measure_stage(configs / "3_extend.yaml")
    model: MoExtend = command.model
    folder = out / "0_language" / "base"
    plan = ExtensionPlan.load(out / "2_probe" / PLAN_FILE)
    text_batches = command.datamodule.test_dataloader()[command.datamodule.test_names.index("text")]
    plots.save_example(command.datamodule, out / EXAMPLE)
    plots.plot_answers(command.datamodule, out / "3_extend" / "predictions_vqa.jsonl", out / "plots" / "answers.png")
    return {
        "vqa_accuracy": extended["vqa"],
        "vqa_accuracy_aligned": aligned["vqa"],
        "text_accuracy_base": base["text"],
        "text_accuracy_extended": extended["text"],
        "text_accuracy_open": measure_open_routing(command),
        "text_logits_identical": text_logits_identical(model, folder, text_batches),
        "frozen_unchanged": base_is_unchanged(out / "3_extend", folder),
        "trainable_parameters_aligned": sum(p.numel() for p in alignment.model.parameters() if p.requires_grad),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "delta_bytes": (out / "3_extend" / DELTA_FILE).stat().st_size,
        "layers": [growth.layer for growth in plan.layers],
        "source_experts": [list(growth.sources) for growth in plan.layers],
        "layer_scores": {str(layer): score for layer, score in plan.report["scores"].items()},
    }


def measure_full_finetune(configs: Path) -> dict[str, Any]:
    """Measures the baseline."""
    accuracy, command = measure_stage(configs / "full_finetune.yaml")
    trainable = sum(p.numel() for p in command.model.parameters() if p.requires_grad)
    return {
        "vqa_accuracy": accuracy["vqa"],
        "text_accuracy": accuracy["text"],
        "trainable_parameters": trainable,
        "learning_rate": command.model.optim.lr,
    }


def once(out: Path, name: str, delta: Path, measure: Any) -> dict[str, Any]:
    """Measures, or reads what was measured of the same weights before."""
    path = out / MEASURED
    known = read_json(path)
    key = file_sha256(delta)
    if known.get(name, {}).get("delta") != key:
        known[name] = {"delta": key, "values": measure()}
        write_json(path, known)
    return dict(known[name]["values"])


def peak_memory_gb(out: Path) -> float:
    """Returns the most memory, in GB, that any finished stage or this process has held."""
    receipts = [read_json(path) for path in out.glob("*/stage.json")]
    now = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return max([now, *(float(receipt.get("peak_memory_gb", 0.0)) for receipt in receipts)])


def write(out: Path, configs: Path, seconds: Mapping[str, float]) -> Path:
    """Measures what is there, writes `report.json`, `report.md` and the plots, and returns the place of the second."""
    extended = out / "3_extend" / DELTA_FILE
    data = once(out, "extended", extended, lambda: measure_extended(out, configs))
    full = out / "full_finetune" / DELTA_FILE
    if full.is_file():
        data["full_finetune"] = once(out, "full_finetune", full, lambda: measure_full_finetune(configs))
        data["full_finetune"]["seconds"] = seconds.get("full_finetune", 0.0)
    data["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    data["peak_memory_gb"] = peak_memory_gb(out)
    runs = {name: out / name / "metrics.csv" for name in TRAINED if (out / name / "metrics.csv").is_file()}
    if runs:  # a run of a few steps logs nothing
        plots.plot_losses(runs, out / "plots" / "losses.png")
    plots.plot_accuracies(data, out / "plots" / "accuracy.png")
    for name in ("usage", "shift"):
        source = out / "2_probe" / "plots" / f"{name}.png"
        shutil.copyfile(source, out / "plots" / source.name)
    source = out / "3_extend" / "plots" / "usage.png"
    shutil.copyfile(source, out / "plots" / "usage_extended.png")
    write_json(out / REPORT_DATA, data)
    write_text(out / REPORT, markdown(data))
    log.info(
        "pictures %.3f, text %.3f (base %.3f)",
        *(data[f"{n}"] for n in ("vqa_accuracy", "text_accuracy_extended", "text_accuracy_base")),
    )
    return out / REPORT
