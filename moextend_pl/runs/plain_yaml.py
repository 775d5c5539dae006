"""YAML that stays what it looks like: a few lines can spell out to billions of values, or nest without end."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 40
"""Levels of a value inside of values; a stage file has about ten."""

MOST_VALUES = 20_000
"""Values of one file, those behind an alias counted wherever it stands."""


class PlainLoader(yaml.SafeLoader):
    """A safe loader that gives up on texts whose nesting or aliases, spelled out, are beyond any setting."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a value and what it holds, and counts them.

        Raises:
            MarkedYAMLError: If the text nests too deep, holds too much, or a value holds itself.
        """
        event = self.peek_event()
        is_alias, before = self.check_event(yaml.AliasEvent), self._values
        self._depth += 1
        if self._depth > DEEPEST:
            raise _too_much(f"values nest deeper than {DEEPEST} levels", event.start_mark)
        node = super().compose_node(parent, index)
        if node is None:
            return None
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise _too_much("a value holds itself", event.start_mark)
        self._values += self._sizes[node] if is_alias else 1
        if self._values > MOST_VALUES:
            raise _too_much(f"aliases spelled out, it holds more than {MOST_VALUES} values", event.start_mark)
        if not is_alias:
            self._sizes[node] = self._values - before
        return node


def _too_much(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_yaml(text: str) -> Any:
    """Returns what a YAML text says.

    Raises:
        YAMLError: If it is no valid YAML, nests too deep or holds too much.
    """
    return yaml.load(text, Loader=PlainLoader)
