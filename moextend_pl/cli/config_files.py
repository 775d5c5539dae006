"""Reading of stage files before they are parsed: layers, positions, and the classes they may name.

A config file may begin with `base: [../base.yaml]`: the files it is layered on, relative to itself, or the package's
own by name where no such file lies.
Later files win; a list is extended with `key+:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moextend_pl.cli.recipes import own_config
from moextend_pl.contracts import UserError
from moextend_pl.runs.plain_yaml import PlainLoader

ALLOWED_PACKAGES = ("moextend_pl", "datamodules", "callbacks", "lightning", "torch")
BASE_KEY = "base"
CONFIG_OPTIONS = ("--config", "-c")
ALLOW_OPTION = "--allow-class-path"


@dataclass(frozen=True)
class StageArguments:
    """A command line whose layers are spelled out.

    Attributes:
        argv: The command line for the parser, with one `--config` for each layer.
        files: Those layers in the order in which they are applied.
        packages: What a value of them may import.
    """

    argv: list[str]
    files: list[Path]
    packages: tuple[str, ...]


def prepare_arguments(argv: Sequence[str]) -> StageArguments:
    """Expands the layers of every `--config` and takes off the command line which packages are allowed.

    Args:
        argv: Command line of `fit`, `validate`, `test` or `predict`.

    Raises:
        UserError: If a file is missing, is not valid YAML or is based on itself.
    """
    expanded: list[str] = []
    files: list[Path] = []
    allowed = list(ALLOWED_PACKAGES)
    tokens = iter(argv)
    for token in tokens:
        option, has_value, value = token.partition("=")
        if option in (*CONFIG_OPTIONS, ALLOW_OPTION) and not has_value:
            value = next(tokens, "")
        if option in (*CONFIG_OPTIONS, ALLOW_OPTION) and not value:
            raise UserError(f"expected a value after {option}, got none.")
        if option in CONFIG_OPTIONS:
            path = _found(Path(value), Path(value))
            layers = [layer for layer in expand_layers(path, "--config") if layer not in files]
            layers = layers or [path]  # given twice on purpose: it is applied again
            files.extend(layers)
            expanded.extend(f"--config={layer}" for layer in layers)
        elif option == ALLOW_OPTION:
            allowed.append(_package(value))
        elif option == f"--{BASE_KEY}":
            raise UserError("`base` belongs into a config file; on the command line give several `--config`.")
        else:
            expanded.append(token)
    return StageArguments(expanded, files, tuple(allowed))


def expand_layers(path: Path, asked_by: str, chain: tuple[Path, ...] = ()) -> list[Path]:
    """Returns a config file after all the files it is layered on, each once.

    Args:
        path: The config file.
        asked_by: Who named it, for the error message.
        chain: Files that are being expanded around it.

    Raises:
        UserError: If a file is missing, broken or based on itself.
    """
    if any(path.resolve() == earlier.resolve() for earlier in chain):
        circle = " -> ".join(str(step) for step in (*chain, path))
        raise UserError(f"{asked_by}: the `base` files form a circle: {circle}. Remove one of the links.")
    layers: list[Path] = []
    for base in _bases(read_config(path, asked_by), path):
        for layer in expand_layers(base, str(path), (*chain, path)):
            if layer not in layers:
                layers.append(layer)
    return [*layers, path]


def read_config(path: Path, asked_by: str) -> yaml.MappingNode:
    """Reads a YAML file as nodes that know their line.

    Raises:
        UserError: If it is missing, empty, not a mapping, not valid YAML or has the same key twice.
    """
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "nothing"
        raise UserError(f"{asked_by}: expected a config file at '{path}', found {kind} (looking from {Path.cwd()}).")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML, {error.problem or error.context}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text in UTF-8 ({error}).") from error
    if not isinstance(node, yaml.MappingNode):
        got = "an empty file" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        raise UserError(f"{path}: expected keys such as `model:` and `data:`, got {got}.")
    _refuse_double_keys(node, path)
    return node


def locate_key(key: str, files: Sequence[Path]) -> str:
    """Returns `FILE:LINE: ` of the last place where a key stands, or nothing if no file has it.

    Args:
        key: Dotted, as the user reads it: without `init_args` and without places in lists.
        files: Config files in the order in which they are applied.
    """
    for path in reversed(files):
        lines = [line for name, line in _dotted_keys(read_config(path, "--config")) if name == key]
        if lines:
            return f"{path}:{lines[-1]}: "
    return ""


def locate_value(text: str, files: Sequence[Path]) -> str:
    """Returns `FILE:LINE: ` of the last place where a value stands, or nothing if no file has it."""
    for path in reversed(files):
        lines = [node.start_mark.line + 1 for node in _scalars(read_config(path, "--config")) if node.value == text]
        if lines:
            return f"{path}:{lines[-1]}: "
    return ""


def readable_key(key: str) -> str:
    """Returns a dotted key without the levels that only the parser needs."""
    return ".".join(part for part in key.split(".") if part not in ("init_args", "dict_kwargs"))


def _dotted_keys(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields (readable key, line) of every key below a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = readable_key(f"{prefix}.{key.value}".strip(".")).rstrip("+")
            yield name, key.start_mark.line + 1
            yield from _dotted_keys(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _dotted_keys(value, prefix)


def _bases(node: yaml.MappingNode, path: Path) -> list[Path]:
    for key, value in node.value:
        if key.value != BASE_KEY:
            continue
        names = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(name, yaml.ScalarNode) and name.value for name in names):
            line = value.start_mark.line + 1
            raise UserError(f"{path}:{line}: expected `base` to be a list of files, for example [../base.yaml].")
        return [_tidy(_found(path.parent / name.value, Path(name.value))) for name in names]
    return []


def _found(path: Path, name: Path) -> Path:
    """Returns a file, or, where nothing lies there, the package's own of that name."""
    return path if path.exists() else own_config(name) or path


def _tidy(path: Path) -> Path:
    """Returns the path without detours, relative to the current directory where that is shorter."""
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved


def _pairs(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yields every (key, value) below a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, value
            yield from _pairs(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _pairs(value)


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Yields every single value below a node, those in lists included."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    else:
        for item in node.value:
            yield from _scalars(item[1] if isinstance(item, tuple) else item)


def _refuse_double_keys(node: yaml.Node, path: Path) -> None:
    mappings = [node, *(value for _, value in _pairs(node))]
    for mapping in (item for item in mappings if isinstance(item, yaml.MappingNode)):
        seen: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if str(key.value) in seen:
                first = seen[str(key.value)]
                raise UserError(f"{path}:{line}: the key '{key.value}' stands twice (first in line {first}).")
            seen[str(key.value)] = line


def _package(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\.?", value):
        raise UserError(f"expected a package after {ALLOW_OPTION}, for example `my_package`, got '{value}'.")
    return value.rstrip(".")
