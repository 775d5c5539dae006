"""FSDP2 and expert parallelism as a strategy of Lightning, whose checkpoints are those of any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.moe.dispatch import FROZEN_EXPERTS, KERNEL_EXPERTS
from moextend_pl.runs.sharded import for_a_file, sharded_as
from moextend_pl.training.sharding.gradients import share_gradients
from moextend_pl.training.sharding.units import shard, share_experts

A_NODE = "node"
LAYERS, EXPERTS = "layers", "experts"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, or expert parallelism: ranks share the weights of the language model, and all gradients.

    Layers are gathered where they compute; experts stay where they are, and tokens travel to them. HSDP is FSDP2 with
    several copies.

    A checkpoint is one file with whole tensors of what learns, as that of one process or DDP, and continues there.

    Args:
        copies: Copies of the weights, each shared by as many ranks; `node` for one on each node.
        share: `layers`, every decoder layer in parts, or `experts`, those of the frozen base, all else whole.
        process_group_backend: As in Lightning; by the device where it is None.
        timeout: How long ranks wait for each other.
    """

    def __init__(
        self,
        copies: int | Literal["node"] = 1,
        share: Literal["layers", "experts"] = "layers",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.copies, self.share = copies, share

    def setup_environment(self) -> None:
        """Lets the processes meet, and lays them out as copies times ranks that share one.

        Raises:
            UserError: If the processes do not divide into copies of several.
        """
        ranks = self.num_nodes * self.num_processes
        copies = self.num_nodes if self.copies == A_NODE else int(self.copies)
        if copies < 1 or ranks % copies or (copies > 1 and ranks == copies):
            raise UserError(
                f"Expected processes that divide into {copies} copies of several each, got {ranks}. Change `copies` of "
                "ShardedStrategy, or use `trainer.strategy: ddp`, under which every process has a copy."
            )
        # Lightning's mesh has these two dimensions; ranks of one copy stand side by side, most often on one node.
        self._data_parallel_size, self._tensor_parallel_size = copies, ranks // copies
        super().setup_environment()

    @property
    def shard_mesh(self) -> DeviceMesh:
        """Ranks that share weights: copies x ranks of one, or ranks alone where there is one copy."""
        return self.device_mesh if self._data_parallel_size != 1 else self.device_mesh["tensor_parallel"]

    def divide(self, model: PreTrainedModel) -> None:
        """Leaves this rank its part of a language model, in place.

        Args:
            model: Grown and frozen as it will be trained.

        Raises:
            UserError: If it cannot be divided.
        """
        (share_experts if self.share == EXPERTS else shard)(model, self.shard_mesh)

    def in_turn(self, make: Callable[[], object], at_once: bool = False) -> None:
        """Lets the processes of a node make their models one after another: the host has room for a whole one once.

        Args:
            make: Makes it, and leaves this rank's part of it; talks to no other rank.
            at_once: Whether they make them all at once, since each reads its part alone.

        Raises:
            Exception: What `make` raised, when all have had their turn.
            UserError: If it raised on another rank.
        """
        error: Exception | None = None
        for turn in (self.local_rank,) if at_once else range(self.num_processes):
            if turn == self.local_rank:
                try:
                    make()
                except Exception as found:
                    error = found
            self.barrier()
        failed = self.reduce_boolean_decision(error is not None, all=False)
        if error is not None:
            raise error
        if failed:
            raise UserError("Another process could not make its model, and says why. This one ends with it.")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank learns from samples of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint is read when the networks are built, as under DDP."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer is read by `load_optimizer_state_dict`, as under DDP."""
        return True

    def setup(self, trainer: Trainer) -> None:
        """Sets up, and keeps validation out of inference mode, whose weights no backward pass could use again."""
        loops: Any = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.fit_loop.epoch_loop)
        for loop in loops:
            getattr(loop, "val_loop", loop).inference_mode = False
        super().setup(trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Shares the gradients of what is whole on each rank; a step of several batches may share them each time."""
        super().post_backward(closure_loss)
        share_gradients(self._module.parameters())

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the tensors of a checkpoint: all but frozen parameters, whole on the rank that writes."""
        frozen = {name for name, parameter in self._module.named_parameters() if not parameter.requires_grad}
        state = self._module.state_dict()
        return {name: for_a_file(state[name], self.is_global_zero) for name in state if name not in frozen}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of an optimizer, whole on the rank that writes."""
        found: dict[str, Any] = ParallelStrategy.optimizer_state(self, optimizer)
        state = {
            number: {
                name: for_a_file(value, self.is_global_zero) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
            for number, values in found["state"].items()
        }
        return {**found, "state": state}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes one file, on the first rank."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads one file, on every rank."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's part of every tensor."""
        held = self._module.state_dict()
        state = {name: sharded_as(t, held[name]) if name in held else t for name, t in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's part of what optimizers keep for every parameter."""
        states = [
            _sharded_state(optimizer, state)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        ParallelStrategy.load_optimizer_state_dict(self, {**checkpoint, "optimizer_states": states})


def _sharded_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: sharded_as(value, parameter) if isinstance(value, Tensor) else value
            for name, value in saved["state"][number].items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in saved["state"]
    }
    return {**saved, "state": state}


def sharded(module: LightningModule) -> ShardedStrategy | None:
    """Returns the strategy that shards a module; None under any other, and without a trainer."""
    strategy = module.trainer.strategy if module._trainer is not None else None
    return strategy if isinstance(strategy, ShardedStrategy) else None


def check_sharding(module: LightningModule) -> None:
    """Refuses to shard what cannot be sharded, before a weight is read.

    Args:
        module: Attached to a trainer; its networks are not built.

    Raises:
        UserError: If the strategy would not share gradients, or the module cannot be sharded.
    """
    strategy = sharded(module)
    if isinstance(module.trainer.strategy, ModelParallelStrategy) and strategy is None:
        raise UserError(
            f"`trainer.strategy` {type(module.trainer.strategy).__name__} does not share gradients here. Use "
            "`moextend_pl.ShardedStrategy`, which shards what this model can be sharded by, or a class made from it."
        )
    if strategy is not None:
        check_parts(module, strategy.share)


def check_parts(module: LightningModule, share: str) -> None:
    """Refuses a module that cannot be sharded.

    Args:
        module: Built or not.
        share: As in `ShardedStrategy`.

    Raises:
        UserError: If it has no language model, or that is to be held in 4 bits or compiled.
    """
    languages: list[Any] = [part for part in module.modules() if hasattr(part, "compute")]
    computes = [part.compute for part in languages]
    if not computes:
        raise UserError(
            f"{type(module).__name__} has no language model, whose layers are what is sharded. Use "
            "`trainer.strategy: ddp`."
        )
    if any(compute.quantize for compute in computes):
        raise UserError(
            "A base in 4 bits (`language.compute.quantize`) is not sharded: its packed weights have no rows to cut. "
            "Use `trainer.strategy: ddp`, under which each process holds it whole, or remove `quantize`."
        )
    if any(compute.compile for compute in computes):
        raise UserError(
            "Layers that are shared are not compiled: gathering their weights, or sending tokens to experts, would "
            "break the graph. Remove `language.compute.compile`, or use `trainer.strategy: ddp`."
        )
    if share == EXPERTS:
        for language in languages:
            _check_experts(language, getattr(module, "train_plan", None))


def _check_experts(language: Any, plan: TrainPlan | None) -> None:
    """Refuses a language model whose experts cannot be shared, from what is known before it is built."""
    if language.dense or language.upcycle_spec is not None:
        raise UserError(
            "`expert_parallel` shares the experts of a frozen base, got a language model that is dense or upcycled. "
            "Use `trainer.strategy: fsdp2`, which also shares weights that learn."
        )
    if plan is None or "language" in plan.parts:
        raise UserError(
            "`expert_parallel` shares the experts of a frozen base, and here they learn. Use `trainer.strategy: "
            "fsdp2`, or leave `language` out of `TrainOnly.parts`."
        )
    if language.compute.experts_implementation not in (FROZEN_EXPERTS, KERNEL_EXPERTS):
        raise UserError(
            f"`expert_parallel` computes experts as `moextend` does, got `experts_implementation: "
            f"{language.compute.experts_implementation}`. Leave it out, or use `trainer.strategy: fsdp2`."
        )
