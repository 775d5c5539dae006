"""The code that travels in an exported folder, for `trust_remote_code`: files of this package, their imports rewritten.

Kernels, 4 bits, shares of processes and files of bases stay at home: what they have in common with the rest is replaced
by a few lines that say so.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import moextend_pl

PACKAGE = "moextend_pl"
ROOTS = {
    "export.configuration": "configuration_moextend",
    "export.modeling": "modeling_moextend",
    "export.processing": "processing_moextend",
}
AUTO_MAP = {
    "AutoConfig": "configuration_moextend.MoExtendConfig",
    "AutoModelForImageTextToText": "modeling_moextend.MoExtendForConditionalGeneration",
    "AutoProcessor": "processing_moextend.MoExtendProcessor",
    "AutoImageProcessor": "processing_moextend.MoExtendImageProcessor",
}
IMPORT = re.compile(rf"^(\s*from ){PACKAGE}\.([\w.]+)( import )", re.MULTILINE)
STAND_INS = {
    "models.model_folder": '''"""Stands for folders of bases and towers, of which an exported model needs none."""

from typing import Any


def read_config(*_: Any, **__: Any) -> Any:
    """Is never called."""
    raise NotImplementedError


def read_model(*_: Any, **__: Any) -> Any:
    """Is never called."""
    raise NotImplementedError
''',
    "runs.fingerprints": '''"""Stands for checks of weights, which transformers reads for an exported model."""

from typing import Any


def check_weights(*_: Any) -> None:
    """Is never called."""
    raise NotImplementedError


def check_weight_file(*_: Any) -> Any:
    """Is never called."""
    raise NotImplementedError
''',
    "moe.dispatch": '''"""Stands for the package's kernels: without them transformers computes all experts."""

from typing import Any

from torch import Tensor


def by_kernels(experts: Any, x_TD: Tensor) -> bool:
    """Returns that no kernel computes these experts."""
    return False


def routed_by_kernels(*_: Any) -> bool:
    """Returns that no kernel selects experts."""
    return False


def kernel_experts(*_: Any) -> Tensor:
    """Is never called."""
    raise NotImplementedError


def kernel_routing(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Is never called."""
    raise NotImplementedError
''',
    "moe.nf4": '''"""Stands for weights in 4 bits, of which an exported model has none."""

from collections.abc import Sequence

from torch import Tensor, nn


def packed_rows(experts: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
    """Returns nothing: no weight is packed."""
    return {}
''',
    "moe.parallel.cut": '''"""Stands for experts that processes share, of which an exported model has none."""

from collections.abc import Sequence

from torch import Tensor


def copied_rows(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns copies of entries of a tensor's first dimension."""
    return value.detach()[list(rows)].clone()
''',
}
HEADER = "# Copied from moextend_pl {version} by its command `export`; Apache-2.0.\n"


def travelling_files() -> dict[str, str]:
    """Returns the files by name: the three that transformers is told of, and all of the package that they import."""
    texts: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module] = STAND_INS.get(module) or _source(module)
            waiting += _imported(texts[module])
    header = HEADER.format(version=moextend_pl.__version__)
    return {f"{_flat_name(module)}.py": header + _rewritten(text) for module, text in sorted(texts.items())}


def write_code(folder: Path) -> None:
    """Writes the files into a folder."""
    for name, text in travelling_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def _source(module: str) -> str:
    path = Path(__file__).parents[1].joinpath(*module.split("."))
    return path.with_suffix(".py").read_text(encoding="utf-8")


def _imported(text: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    prefix = f"{PACKAGE}."
    return [node.module.removeprefix(prefix) for node in nodes if node.module and node.module.startswith(prefix)]


def _flat_name(module: str) -> str:
    return ROOTS.get(module, module.replace(".", "_"))


def _rewritten(text: str) -> str:
    return IMPORT.sub(lambda found: f"{found[1]}.{_flat_name(found[2])}{found[3]}", text)
