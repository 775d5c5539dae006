"""The report of `real` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"full_finetune": "full fine-tuning of the dense model", "low_rank": "LoRA on the dense model"}
SHORT = {"full_finetune": "full fine-tuning", "low_rank": "LoRA"}


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([_row(*head), _row(*("---" for _ in head)), *(_row(*row) for row in rows)])


def _baselines(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in NAMES if name in data}


def pictures_table(data: Mapping[str, Any]) -> str:
    """Returns the accuracy on held-out pictures and the learned parameters of each model."""
    rows: list[Sequence[object]] = [
        ("most frequent answer to each question, no picture", f"{data['blind']['blind_accuracy']:.3f}", "-"),
        ("aligned: projector only", f"{data['vqa_accuracy_aligned']:.3f}", "-"),
        ("**extended, masked routing**", f"**{data['vqa_accuracy']:.3f}**", f"{data['trainable_parameters']:,}"),
    ]
    for name, values in _baselines(data).items():
        rows.append((NAMES[name], f"{values['vqa_accuracy']:.3f}", f"{values['trainable_parameters']:,}"))
    return _table(("model", "held-out pictures", "parameters learned"), rows)


def _shown(knowledge: Mapping[str, Any]) -> str:
    value = knowledge["perplexity"]
    return f"{knowledge['accuracy']:.3f}" if value is None else f"{value:.3f}"


def text_table(data: Mapping[str, Any]) -> str:
    """Returns what each model knows of each text: perplexity of prose, accuracy of questions."""
    rows = []
    baselines = _baselines(data)
    for name, each in data["text"].items():
        kind = "accuracy" if each["base"]["perplexity"] is None else "perplexity"
        others = [values["text"][name] for values in baselines.values()]
        dense = [_shown(others[0]["base"])] if others else []
        rows.append((f"{name}, {kind}", *dense, _shown(each["base"]), _shown(each["extended"]),
                     *(_shown(other["extended"]) for other in others)))  # fmt: skip
    dense = ["dense model"] if baselines else []
    return _table(("text", *dense, "upcycled base", "**extended**", *(SHORT[name] for name in baselines)), rows)


def answers_table(data: Mapping[str, Any], instructions: Sequence[str]) -> str:
    """Returns the answers to instructions side by side."""
    baselines = _baselines(data)
    columns = [data["answers_base"], data["answers"], *(values["answers"] for values in baselines.values())]
    rows = [(asked, *answers) for asked, *answers in zip(instructions, *columns, strict=True)]
    return _table(("asked", "upcycled base", "extended", *(SHORT[name] for name in baselines)), rows)


TEMPLATE = """# A language model that people know learned to see

SmolLM2-135M-Instruct became a mixture of 4 experts, 2 for each token, in each of its layers, and was extended: tower,
projector and language model have {total:,} parameters, of which {learned:,} learned to see. Questions are asked in the
model's own chat format; accuracy is exact match of the greedily generated sentence.

{pictures}

Pictures are drawn scenes. {shared} of the {count:,} different pictures of the test split are, by their pixels, in the
training split.

## Questions about pictures that no training has seen

![answers](plots/answers.png)

{examples}

{kinds}

## Nothing was forgotten

- Logits of every token of every text below are bit-identical to the upcycled base's: **{identical}**
- Every frozen tensor is bit-identical to the base's files: **{unchanged}**
- The upcycled base, before its routers learned, is the dense model to rounding: fp32 logits are up to **{apart:.2g}**
  apart, of logits up to {largest:.0f}. It is used in bf16.
- What was learned is a delta of {megabytes:.1f} MB: `3_extend/delta.safetensors`

{text}

Perplexity of held-out prose (lower is better), accuracy of questions whose right end is the most probable. {rates}

{answers}

## Which layers were extended

{count_layers}: {layers}.

![shift](plots/shift.png)

![usage after the extension](plots/usage.png)

## Training

![losses](plots/losses.png)

| step | seconds |
|---|---|
{seconds}

Peak memory: {memory:.2f} GB.
"""


def _rates(data: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{values['learning_rate']:g} for {SHORT[name]}" for name, values in _baselines(data).items())
    return f"The baselines learned on the same data for the same steps (AdamW, learning rate {rates})." if rates else ""


def markdown(data: Mapping[str, Any], instructions: Sequence[str], shown: Sequence[Mapping[str, Any]]) -> str:
    """Returns what `report.json` holds as Markdown that shows the plots beside it.

    Args:
        data: What was measured.
        instructions: What every model was asked without a picture.
        shown: Questions about held-out pictures with their answers, as `predictions_vqa.jsonl` has them.
    """
    examples = [(row["prompt"], row["prediction"], row["answer"]) for row in shown]
    return TEMPLATE.format(
        total=data["total_parameters"],
        learned=data["trainable_parameters"],
        pictures=pictures_table(data),
        shared=data["blind"]["shared_pictures"],
        count=data["blind"]["pictures"],
        examples=_table(("asked", "answered", "right"), examples),
        kinds=_table(
            ("questions that begin with", "right"),
            [(kind, f"{share:.3f}") for kind, share in data["vqa_by_beginning"].items()],
        ),
        identical=_yes(data["text_logits_identical"]),
        unchanged=_yes(data["frozen_unchanged"]),
        apart=data["upcycling"]["largest_difference"],
        largest=data["upcycling"]["largest_logit"],
        megabytes=data["delta_bytes"] / 1e6,
        text=text_table(data),
        rates=_rates(data),
        answers=answers_table(data, instructions),
        layers=", ".join(map(str, data["layers"])),
        count_layers=f"{len(data['layers'])} of {data['layers_of_model']}, a new expert each",
        seconds="\n".join(_row(name, f"{value:.0f}") for name, value in data["seconds"].items()),
        memory=data["peak_memory_gb"],
    )
