"""Writes the pages that are read off the code: `make docs`, and with the table of families `make families`.

`errors.md` has every sentence that a user's mistake can end in, `configuration.md` every key of a stage file,
`families.md` what is measured on a tiny model of every family. Tests hold them current.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docstring_parser import parse

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "benchmarks")]

import pages  # noqa: E402

import callbacks  # noqa: E402
import datamodules  # noqa: E402
import moextend_pl  # noqa: E402
from datamodules.mixture import ShardSet  # noqa: E402
from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec  # noqa: E402
from datamodules.streaming import StreamOptions  # noqa: E402
from moextend_pl.inference.spec import GenerationSpec  # noqa: E402
from moextend_pl.models.base_model import ComputeSpec  # noqa: E402
from moextend_pl.models.tower import FeatureSpec  # noqa: E402
from moextend_pl.training.language_losses import RouterWeights  # noqa: E402

PACKAGES = ("moextend_pl", "datamodules", "callbacks")
ERRORS, CONFIGURATION = "errors.md", "configuration.md"
MISTAKES = ("UserError", "ShardError")
RULES = [name for name in moextend_pl.__all__ if name.endswith(("Rule", "Layers"))]
SECTIONS: dict[str, list[Any]] = {
    "Models": [getattr(moextend_pl, name) for name in ("MoExtend", "VisionEncoder", "Projector", "MoELanguageModel")],
    "Groups inside of models": [
        *(getattr(moextend_pl, name) for name in ("OptimSpec", "UpcycleSpec")),
        FeatureSpec,
        RouterWeights,
        ComputeSpec,
        GenerationSpec,
    ],
    "Data": [
        datamodules.ImageTextShards,
        datamodules.OwnPipeline,
        ShardSet,
        RowSpec,
        EvaluationSpec,
        ReadingSpec,
        StreamOptions,
    ],
    "Callbacks": [getattr(callbacks, name) for name in callbacks.__all__],
    "Layer rules": [getattr(moextend_pl, name) for name in RULES],
    "Extension plan (a file of its own)": [moextend_pl.ExtensionPlan, moextend_pl.LayerGrowth],
}


def spoken(node: ast.expr) -> str:
    """Returns a message as a user reads it, with `…` for what differs from case to case."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(spoken(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spoken(node.left) + spoken(node.right)
    return "…"


def sentences(tree: ast.Module) -> Iterator[str]:
    """Yields every message of a mistake that a file raises itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            text = re.sub("…+", "…", " ".join(spoken(node.args[0]).split()))
            if node.func.id in MISTAKES and re.search(r"[a-z]{3}", text):
                yield text


def errors_page() -> str:
    """Returns the page of mistakes."""
    lines = [
        "# What a mistake is answered with",
        "",
        "Every sentence that a user's mistake can end in, by the file that says it; the command exits with 2. `…`",
        "stands for what differs from case to case: search this page for a few words of yours. Written by `make docs`.",
    ]
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found = sorted(set(sentences(ast.parse(path.read_text(encoding="utf-8")))))
            if found:
                lines += ["", f"## {path.relative_to(ROOT)}", "", *(f"- {text}" for text in found)]
    return "\n".join(lines) + "\n"


def written(default: Any) -> str:
    """Returns a default as YAML has it."""
    if default is inspect.Parameter.empty:
        return "required"
    if isinstance(default, bool) or default is None:
        return f"`{str(default).lower().replace('none', 'null')}`"
    return (
        f"`{list(default)}`"
        if isinstance(default, tuple)
        else "empty"
        if callable(default) or repr(default) == "<factory>"
        else f"`{default}`"
    )


def keys(kind: Any) -> Iterator[tuple[str, str, str]]:
    """Yields key, default and meaning of everything that a class takes."""
    # What a class inherits is explained where it is said first; the nearest word counts.
    docs = [parse(parent.__doc__ or "") for parent in reversed(kind.__mro__)]
    meaning = {item.arg_name: " ".join((item.description or "").split()) for doc in docs for item in doc.params}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield name, written(parameter.default), meaning.get(name, "")


def configuration_page() -> str:
    """Returns the page of keys."""
    lines = [
        "# Every key of a stage file",
        "",
        "What stands under `init_args` of a class, or under the key of a group. Keys of `trainer` are Lightning's.",
        "Written by `make docs` from the docstrings.",
    ]
    for title, kinds in SECTIONS.items():
        lines += ["", f"## {title}"]
        for kind in kinds:
            short = " ".join((parse(inspect.getdoc(kind) or "").short_description or "").split())
            rows = [f"| `{name}` | {default} | {text.replace('|', '/')} |" for name, default, text in keys(kind)]
            lines += ["", f"### {kind.__name__}", "", short]
            lines += ["", "| key | default | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the pages; `--families` the table of families, which takes a model of each, beside them."""
    folder = Path(__file__).parent
    (folder / ERRORS).write_text(errors_page(), encoding="utf-8")
    (folder / CONFIGURATION).write_text(configuration_page(), encoding="utf-8")
    if "--families" in sys.argv[1:]:
        from helpers import family_table

        pages.put(folder / "families.md", "make families", family_table.table())


if __name__ == "__main__":
    main()
