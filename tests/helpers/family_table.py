"""The table of docs/families.md: what the code reads off the router of every family, or why it refuses."""

from __future__ import annotations

import re
from typing import Any

import transformers
from helpers.tiny_families import families, tiny_model

from moextend_pl.contracts import UserError
from moextend_pl.moe.blocks import MoEBlock, find_blocks
from moextend_pl.moe.families import RouterFacts, read_facts

HEADER = ["| family | scores | weights | bias | groups |", "|---|---|---|---|---|"]


def examined(model: Any) -> tuple[list[tuple[MoEBlock, RouterFacts]], dict[str, str]]:
    """Returns the blocks that can grow with the facts of their routers, and by router why others cannot."""
    found, refused = [], {}
    for block in find_blocks(model):
        try:
            found.append((block, read_facts(block.router, block.num_experts)))
        except UserError as error:
            refused[type(block.router).__name__] = reason(error)
    return found, refused


def extendable(model: Any) -> list[MoEBlock]:
    """Returns the blocks that can grow."""
    return [block for block, _ in examined(model)[0]]


def reason(error: UserError) -> str:
    """Returns the part of the sentence of a refusal that says why."""
    return re.split("cannot be extended: | with ", str(error).split(". ")[0])[-1]


def row(family: str) -> str:
    """Returns the line of a family, measured."""
    try:
        found, refused = examined(tiny_model(family))
    except UserError as error:
        found, refused = [], {"": reason(error)}
    if not found:
        return f"| {family} | refused: {', '.join(refused.values())} |  |  |  |"
    facts = found[0][1]
    scoring = facts.scoring
    weights = ["normalised"] if scoring.normalised else []
    weights += [f"times {scoring.scale:g}"] if scoring.scale != 1 else []
    bias = [f"{scoring.biased} for the selection"] if facts.selection_bias else []
    bias += ["logits"] if facts.logit_bias else []
    groups = f"best {scoring.group_score} of {scoring.groups}" if scoring.groups > 1 else ""
    name = f"{family} (not {', '.join(refused)})" if refused else family
    return f"| {name} | {scoring.score} | {', '.join(weights)} | {', '.join(bias)} | {groups} |"


def table() -> str:
    """Returns the whole table, and above it what it was measured with."""
    rows = [row(family) for family in sorted(families())]
    taken = sum("| refused: " not in line for line in rows)
    facts = f"{taken} of the {len(rows)} families of transformers {transformers.__version__} can be extended:"
    return "\n".join([facts, "", *HEADER, *rows])
