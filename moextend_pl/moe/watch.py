"""Watches the routers of a model and records what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moextend_pl.moe.blocks import list_blocks
from moextend_pl.moe.families import sort_output
from moextend_pl.moe.usage import RouterRecord


class RouterWatch:
    """Records what every router of a model does, while somebody asks for it."""

    def __init__(self) -> None:
        self._recorders: list[_Recorder] = []
        self._handles: list[RemovableHandle] = []
        self._listeners: list[list[RouterRecord]] = []
        self.listening = False

    def attach(self, model: nn.Module) -> None:
        """Watches the routers that a model has now, and none that it had before.

        Args:
            model: A model with mixture-of-experts blocks, grown or not; a dense one has no router to watch.
        """
        for handle in self._handles:
            handle.remove()
        blocks = list_blocks(model)
        self._recorders = [_Recorder(self, block.layer, block.num_experts) for block in blocks]
        self._handles = [
            block.router.register_forward_hook(recorder)
            for block, recorder in zip(blocks, self._recorders, strict=True)
        ]

    def hear(self, record: RouterRecord) -> None:
        """Hands a record to all who ask for records now."""
        for records in self._listeners:
            records.append(record)

    @contextmanager
    def recording(self) -> Iterator[list[RouterRecord]]:
        """Collects what every router does inside the `with` block, in the order of the layers; blocks may nest.

        What compiled layers did is in the list when the block ends.
        """
        records: list[RouterRecord] = []
        self._listeners.append(records)
        self.listening = True
        try:
            yield records
        finally:
            records.extend(one.record(*one.compiled) for one in self._recorders if one.compiled is not None)
            self._listeners = [other for other in self._listeners if other is not records]
            self.listening = bool(self._listeners)
            if not self.listening:
                for one in self._recorders:
                    one.compiled = None


class _Recorder:
    """The hook; an object and no function, so that a deep copy of a model reports to the watch of the copy."""

    def __init__(self, watch: RouterWatch, layer: int, num_experts: int) -> None:
        self.watch, self.layer, self.num_experts = watch, layer, num_experts
        self.compiled: tuple[Tensor, Tensor, int] | None = None

    def record(self, logits: Tensor, indices: Tensor, sequences: int) -> RouterRecord:
        """Returns the record of one pass."""
        return RouterRecord(self.layer, self.num_experts, logits, indices, sequences)

    def __call__(self, _router: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if not self.watch.listening:
            return
        x = inputs[0] if inputs else None
        sequences = x.shape[0] if isinstance(x, Tensor) and x.dim() == 3 else 1
        logits, _, indices = sort_output(output)
        if torch.compiler.is_compiling():
            # Neither the list, which is longer in each layer, nor the layer's number: one graph then serves all layers.
            self.compiled = (logits, indices, sequences)
        else:
            self.watch.hear(self.record(logits, indices, sequences))
