"""Batch normalisation over the batches of all ranks, on any device.

torch's own SyncBatchNorm needs a GPU. Shapes: B images of this rank, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from moextend_pl.contracts import UserError


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose statistics in training are those of the global batch.

    Every rank has the same number of images, so that a mean over ranks is a mean over images.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalises (B, C, H, W)."""
        if not self.training:
            return super().forward(x_BCHW)
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None and running_var is not None and batches is not None  # noqa: PT018
        momentum = 0.1 if self.momentum is None else self.momentum
        mean_C = _mean_over_ranks(x_BCHW.mean((0, 2, 3)))
        # Around the mean, in a pass of its own: the difference of two large squares would lose the variance.
        var_C = _mean_over_ranks((x_BCHW - mean_C[:, None, None]).square().mean((0, 2, 3)))
        with torch.no_grad():
            count = x_BCHW.numel() / x_BCHW.shape[1] * dist.get_world_size()
            running_mean.lerp_(mean_C, momentum)
            running_var.lerp_(var_C * count / (count - 1), momentum)
            batches += 1
        # By hand: torch's function lets no gradient through to statistics that it is given.
        scale_C = self.weight * (var_C + self.eps).rsqrt()
        return (x_BCHW - mean_C[:, None, None]) * scale_C[:, None, None] + self.bias[:, None, None]


def _mean_over_ranks(value: Tensor) -> Tensor:
    # It has to let gradients through: every rank's loss depends on every rank's images.
    mean: Tensor = all_reduce(value) / dist.get_world_size()
    return mean


def share_statistics(module: nn.Module) -> None:
    """Lets every `BatchNorm2d` of a module use the statistics of all ranks, where there are several.

    Args:
        module: Changed in place; parameters and buffers stay as they are.

    Raises:
        UserError: If a layer is a variant of `BatchNorm2d` that does more than normalise.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and type(child) is not nn.BatchNorm2d:
                raise UserError(
                    f"Expected plain BatchNorm2d layers in a tower that learns on several processes, got "
                    f"{type(child).__name__} at {name!r}. Train the tower on one process, or choose another tower."
                )
            if isinstance(child, nn.BatchNorm2d):
                wide = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
                wide.load_state_dict(child.state_dict())
                setattr(parent, name, wide)
