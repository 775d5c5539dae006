"""A stage of seconds for the command-line tests: one linear layer on constant data."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from moextend_pl.contracts import UserError


class Inner:
    def __init__(self, width: int = 3) -> None:
        self.width = width


class Toy(LightningModule):
    def __init__(
        self, n_experts: int = 4, lr: float = 0.1, fail: str = "", inner: Inner | None = None, anything: Any = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["inner", "anything"])  # into the checkpoint, where nothing may read them back
        self.layer = torch.nn.Linear(4, 1)
        self.lr = lr
        self.fail = fail
        if fail == "init":
            raise UserError("the base\nis missing")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.fail == "fit":
            raise UserError("sample 7 has no answer")
        if self.fail == "bug":
            raise KeyError("a bug")
        return self.layer(batch).pow(2).mean()

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.tested = self.layer.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ToyData(LightningDataModule):
    def __init__(self, batch_size: int = 2, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(8, 4), batch_size=self.batch_size)

    test_dataloader = train_dataloader
