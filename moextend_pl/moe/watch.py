"""Watches the routers of a model and records what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moextend_pl.moe.blocks import MoEBlock, find_blocks
from moextend_pl.moe.families import sort_output
from moextend_pl.moe.usage import RouterRecord


class RouterWatch:
    """Records what every router of a model does, while somebody asks for it."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._records: list[RouterRecord] | None = None

    def attach(self, model: nn.Module) -> None:
        """Watches the routers that a model has now, and none that it had before.

        Args:
            model: A transformers mixture-of-experts model, grown or not.

        Raises:
            UserError: If it has no mixture-of-experts block.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = [self._watch(block) for block in find_blocks(model)]

    def _watch(self, block: MoEBlock) -> RemovableHandle:
        layer, num_experts = block.layer, block.num_experts

        def record(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            if self._records is not None:
                logits, _, indices = sort_output(output)
                self._records.append(RouterRecord(layer, num_experts, logits, indices))

        return block.router.register_forward_hook(record)

    @contextmanager
    def recording(self) -> Iterator[list[RouterRecord]]:
        """Collects what every router does inside the `with` block, in the order of the layers."""
        records: list[RouterRecord] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = None
