"""Measures what `real` made: answers about held-out pictures, and what every model still knows of text."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moextend_pl.contracts import PLAN_FILE, ExtensionPlan, UpcycleSpec
from moextend_pl.evaluation.retention import Retention, measure, untouched_logits
from moextend_pl.evaluation.retention_texts import TextSet, read_all_texts, text_rows
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.quickstart.next_steps import EXAMPLE
from moextend_pl.quickstart.report import base_is_unchanged, measure_stage, once, peak_memory_gb
from moextend_pl.reports import plots
from moextend_pl.reports.real_text import markdown
from moextend_pl.runs.atomic import read_json, write_json, write_text
from moextend_pl.runs.manifest import DELTA_FILE

log = logging.getLogger(__name__)

REPORT, REPORT_DATA = "report.md", "report.json"
TRAINED = ("0_vision", "0_language", "1_align", "3_extend", "full_finetune", "low_rank")
BASELINES = ("full_finetune", "low_rank")
INSTRUCTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "What is the opposite of hot?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
)
EXAMPLES = 12
"""Questions that are shown, spread over the test set."""
WORDS = 32
"""Most tokens of an answer to an instruction."""
COMPARED = 256
"""Tokens of each text on which the upcycled model is compared with the dense one, in fp32."""


def texts_of(out: Path) -> list[TextSet]:
    """Returns what is held out, prose first."""
    return read_all_texts([place for kind in ("txt", "jsonl") for place in sorted((out / "texts").glob(f"*.{kind}"))])


def instructed(model: MoExtend) -> list[str]:
    """Lets a model answer the instructions, without a picture."""
    found: Any = model.generate(None, list(INSTRUCTIONS), max_new_tokens=WORDS)
    return [" ".join(answer.split()) for answer in found]


@torch.no_grad()
def upcycling(language: MoELanguageModel, texts: Sequence[TextSet]) -> dict[str, float]:
    """Compares the upcycled model, before its routers learned, with the dense one, both in fp32.

    Args:
        language: As the stage file configures it, not built.
        texts: Of which the beginning of each prose is read.

    Returns:
        The largest difference of a logit, and the largest logit of the dense model.
    """
    language.configure_model()
    language.eval()
    base = str(language.base)
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.float32)
    dense.eval()
    apart = largest = 0.0
    for row in text_rows([text for each in texts for text in each.documents], language.tokenizer, COMPARED):
        ids = torch.tensor([row.ids[:COMPARED]])
        expected: Tensor = dense(input_ids=ids).logits
        found = language({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        apart, largest = max(apart, (found - expected).abs().max().item()), max(largest, expected.abs().max().item())
    return {"largest_difference": apart, "largest_logit": largest}


def _knows(found: Sequence[Retention]) -> dict[str, Any]:
    return {each.name: each.to_dict() for each in found}


def _learned(model: MoExtend) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measure_extended(out: Path, configs: Path) -> dict[str, Any]:
    """Measures base, aligned and extended model."""
    texts = texts_of(out)
    aligned, alignment = measure_stage(configs / "1_align.yaml")
    values: dict[str, Any] = {"vqa_accuracy_aligned": aligned["vqa"], "answers_base": instructed(alignment.model)}
    del alignment
    accuracy, command = measure_stage(configs / "3_extend.yaml")
    model: MoExtend = command.model
    plots.save_example(command.datamodule, out / EXAMPLE)
    plots.plot_answers(command.datamodule, out / "3_extend" / "predictions_vqa.jsonl", out / "plots" / "answers.png")
    knows = measure(model, texts, base=untouched_logits(model))
    plan = ExtensionPlan.load(out / "2_probe" / PLAN_FILE)
    values |= {
        "vqa_accuracy": accuracy["vqa"],
        "blind": read_json(out / "blind" / "blind.json"),
        "answers": instructed(model),
        "text": _knows(knows),
        "text_logits_identical": all(each.drift.identical for each in knows),
        "frozen_unchanged": base_is_unchanged(out / "3_extend", out / "0_language" / "base"),
        "trainable_parameters": _learned(model),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "delta_bytes": (out / "3_extend" / DELTA_FILE).stat().st_size,
        "layers": [growth.layer for growth in plan.layers],
        "layers_of_model": len(model.language.num_experts),
        "source_experts": [list(growth.sources) for growth in plan.layers],
    }
    del command, model
    gc.collect()
    return values | {"upcycling": measure_upcycling(configs / "0_language.yaml", texts)}


def measure_upcycling(config: Path, texts: Sequence[TextSet]) -> dict[str, float]:
    """Compares upcycled and dense model as the stage file of the language model configures them."""
    asked = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]
    return upcycling(MoELanguageModel(base=asked["base"], upcycle=UpcycleSpec.from_dict(asked["upcycle"])), texts)


def measure_baseline(out: Path, config: Path) -> dict[str, Any]:
    """Measures a baseline, and compares its text with that of the dense model it began as."""
    accuracy, command = measure_stage(config)
    model: MoExtend = command.model
    knows = measure(model, texts_of(out), base=untouched_logits(model))
    return {
        "vqa_accuracy": accuracy["vqa"],
        "answers": instructed(model),
        "text": _knows(knows),
        "trainable_parameters": _learned(model),
        "learning_rate": model.optim.lr,
    }


def answered(out: Path) -> list[dict[str, Any]]:
    """Returns the questions about held-out pictures with the answers of the extended model."""
    lines = (out / "3_extend" / "predictions_vqa.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_beginning(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the share of right answers to the questions that begin alike, by their first three words."""
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        kinds.setdefault(" ".join(row["prompt"].split()[:3]), []).append(row["correct"])
    return {kind: sum(right) / len(right) for kind, right in sorted(kinds.items())}


def write(out: Path, configs: Path, seconds: Mapping[str, float]) -> Path:
    """Measures what is there, writes `report.json`, `report.md` and the plots, and returns the place of the second."""
    data = once(out, "extended", out / "3_extend" / DELTA_FILE, lambda: measure_extended(out, configs))
    for name in BASELINES:
        delta = out / name / DELTA_FILE
        if delta.is_file():
            data[name] = once(out, name, delta, lambda name=name: measure_baseline(out, configs / f"{name}.yaml"))
    data["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    data["peak_memory_gb"] = peak_memory_gb(out)
    runs = {name: out / name / "metrics.csv" for name in TRAINED if (out / name / "metrics.csv").is_file()}
    if runs:  # a run of a few steps logs nothing
        plots.plot_losses(runs, out / "plots" / "losses.png")
    for run, name in (("2_probe", "shift"), ("3_extend", "usage")):
        shutil.copyfile(out / run / "plots" / f"{name}.png", out / "plots" / f"{name}.png")
    rows = answered(out)
    data["vqa_by_beginning"] = by_beginning(rows)
    write_json(out / REPORT_DATA, data)
    write_text(out / REPORT, markdown(data, INSTRUCTIONS, rows[:: max(len(rows) // EXAMPLES, 1)][:EXAMPLES]))
    log.info("pictures %.3f (blind %.3f)", data["vqa_accuracy"], data["blind"]["blind_accuracy"])
    return out / REPORT
