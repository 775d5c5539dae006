"""Turns the parser's nested reports into one sentence that names the key, the value and the way out."""

from __future__ import annotations

import difflib
import importlib
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser

from moextend_pl.cli.config_files import ALLOW_OPTION, StageArguments, locate_key, locate_value, readable_key
from moextend_pl.contracts import UserError

_KEY = re.compile(r'Parser key "([^"]+)":?\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':?\s*(.*)")
_UNKNOWN = re.compile(
    r"(?:Subcommand '(?P<command>\w+)' |Group '[^']+' )?(?:does not accept )?[Oo]ption '(?P<key>[^']+)'"
    r"(?: is not accepted)?|unrecognized arguments: --(?P<nested>[\w.]+)"
)
_NOT_ACCEPTED = re.compile(r"Problem with given class_path '([^']+)':\s+(Option '[^']+' is not accepted)")
_CANNOT_IMPORT = re.compile(r"No module named|module '.*' has no attribute|cannot import|Not a valid import path")
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_REQUIRED = "the following arguments are required: "
_SHOWN_LENGTH = 120
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")
_FUNCTION = re.compile(r"(?:Expected a dot import path string: |Type typing\.Callable.* Got value: )(?P<value>.*)")
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Given value type:", "Expected a path but", "tip:")


@dataclass
class _Report:
    """What a nested report says on its innermost level.

    Attributes:
        keys: Keys from the outside to the inside.
        owner: Class whose arguments were being read, if any.
        leaves: The sentences of the innermost level, one for each type that was tried.
        value: The offending value.
    """

    keys: list[str] = field(default_factory=list)
    owner: str = ""
    leaves: list[str] = field(default_factory=list)
    value: str = ""


def explain(message: str, parser: ArgumentParser, arguments: StageArguments) -> str:
    """Returns the user's mistake in one line.

    Args:
        message: What the parser said.
        parser: Parser of the command, which knows the accepted keys.
        arguments: Command line of the run, to tell the line of a mistake and what may be imported.

    Raises:
        UserError: If the mistake is to name code of a package that is not allowed.
    """
    if denied := _DENIED.search(message):
        _refuse_import(denied[1], arguments)
    if message.startswith("unrecognized arguments: "):
        return _explain_unrecognized(message, parser)
    if message.startswith(_REQUIRED):
        missing = ", ".join(name.split(".", 1)[-1] for name in message.split(": ", 1)[1].split(", "))
        return f"the run lacks {missing}. Give a stage file, for example `--config configs/easy_vqa/1_align.yaml`."
    report = _read(message)
    leaf = report.leaves[0] if report.leaves else " ".join(message.split())
    key = readable_key(".".join(report.keys))
    if function := _FUNCTION.match(leaf):
        return (
            f"`{key}`: expected the dotted name of a function, as `package.module.function`, got '{function['value']}'."
        )
    if _EXPECTED.match(leaf) and (deeper := _NOT_ACCEPTED.search(message)):
        report.owner, leaf = deeper.groups()  # one member of a union says more than "expected str"
    if unknown := _UNKNOWN.match(leaf):
        return _explain_unknown(report, unknown, parser, arguments.files)
    if report.owner and leaf.startswith(_REQUIRED):
        return f"`{key}`: {report.owner} lacks {leaf.removeprefix(_REQUIRED)}. Set it under `init_args`."
    if report.owner and _CANNOT_IMPORT.search(leaf):
        return f"`{key}`: cannot import '{report.owner}' ({leaf}){_suggest_class(report.owner)}"
    types = [match["type"] for item in report.leaves if (match := _EXPECTED.match(item))]
    if types and _EXPECTED.match(leaf):
        value = next(
            (m["value"] for item in report.leaves if (m := _EXPECTED.match(item)) and m["value"]), report.value
        )
        return f"`{key}`: expected {_type_names(types)}, got '{value}'."
    if leaf.endswith("object has no attribute 'keys'"):
        leaf = "expected `init_args` to hold names and values"
    got = f" (got {textwrap.shorten(report.value, _SHOWN_LENGTH, placeholder='...')})" if report.value else ""
    return f"`{key}`: {leaf}{got}" if key else leaf


def _read(message: str) -> _Report:
    """Walks from the outer level of a report to its first innermost one."""
    report = _Report()
    depth = -1
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip(" -"))
        if not text or text.startswith(_NOISE):
            continue
        if text.startswith("Given value: "):
            report.value = report.value or text.removeprefix("Given value: ")
        elif report.leaves:
            if indent == depth:
                report.leaves.append(text)
        elif match := _KEY.match(text):
            report.keys.append(match[1])
            if match[2]:
                report.leaves, depth = [match[2]], indent
        elif match := _CLASS.match(text):
            report.owner = match[1]
            if match[2]:
                report.leaves, depth = [match[2]], indent
        else:
            report.leaves, depth = [text], indent
    return report


def _refuse_import(path: str, arguments: StageArguments) -> NoReturn:
    raise UserError(
        f"{locate_value(path, arguments.files)}'{path}' is outside of the packages that a config may import "
        f"({', '.join(arguments.packages)}). A config runs code: if you trust it, "
        f"add `{ALLOW_OPTION} {path.split('.')[0]}`."
    )


def _explain_unknown(report: _Report, match: re.Match[str], parser: ArgumentParser, files: Sequence[Path]) -> str:
    name = match["key"] or match["nested"]
    if report.owner and not match["command"]:
        known = _arguments_of(report.owner)
        owner = report.owner
    else:
        known = _options_of(parser)
        owner = f"`{match['command']}`" if match["command"] else "the command"
    key = readable_key(".".join([*report.keys, name]))
    # what stands on the command line is not to be looked for in the files
    where = "" if "NestedArg" in report.value else locate_key(key, files)
    return f"{where}{owner} does not accept '{key}'{_suggest(name, known)}"


def _explain_unrecognized(message: str, parser: ArgumentParser) -> str:
    words = message.split(": ", 1)[1].split()
    options = [word.split("=", 1)[0].lstrip("-") for word in words if word.startswith("-")]
    if not options:
        return f"unexpected words on the command line: {' '.join(words)}. Options begin with `--`."
    return f"there is no option '--{options[0]}'{_suggest(options[0], _options_of(parser))}"


def _options_of(parser: ArgumentParser) -> list[str]:
    return sorted({action.dest for action in parser._actions if action.dest and action.dest != "help"})


def _arguments_of(class_path: str) -> list[str]:
    """Returns what a class accepts under `init_args`, as the parser resolves it."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    added = parser.add_class_arguments(getattr(importlib.import_module(module), name), "it", fail_untyped=False)
    return [argument.removeprefix("it.") for argument in added]


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    roots = sorted({option.split(".", 1)[0] for option in known})
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
        return f"; did you mean '{close[0].rsplit('.', 1)[-1]}'?" if "." in name else f"; did you mean '{close[0]}'?"
    root = name.split(".", 1)[0]
    if root not in roots and (close := difflib.get_close_matches(root, roots, n=1, cutoff=0.6)):
        return f"; did you mean '{close[0]}'?"
    same_group = [option for option in known if option.rpartition(".")[0] == name.rpartition(".")[0]]
    same_name = [option for option in known if option.rsplit(".", 1)[-1] == last]
    if same_name:
        return f"; did you mean '{same_name[0]}'?"
    names = [option.rsplit(".", 1)[-1] for option in same_group] or roots
    if close := difflib.get_close_matches(last, names, n=1, cutoff=0.5):
        return f"; did you mean '{close[0]}'?"
    return f"; it accepts {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}."


def _suggest_class(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    try:
        home = importlib.import_module(module)
        # What a package imports on first use stands in `__all__` only.
        names = [item for item in {*dir(home), *getattr(home, "__all__", ())} if item[:1].isupper()]
    except ImportError:
        return "; is the package installed and the name spelled right?"
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{module}.{close[0]}'?" if close else "."


def _type_names(types: Sequence[str]) -> str:
    """Writes types the way a user writes them: `<class 'int'>` becomes `int`."""
    names = []
    for name in types:
        plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", name).replace("typing.", "")
        names.append(plain.replace("NoneType", "null"))
    return " or ".join(dict.fromkeys(names))
