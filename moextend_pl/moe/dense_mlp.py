"""Finds dense MLPs in a model by their structure, not by class names.

Shapes: T tokens, D width in, O width out, I hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class DenseMLP:
    """An MLP as its structure tells it: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))`.

    Attributes:
        up: First linear map.
        down: Last linear map.
        act: Activation between them.
        gate: Linear map whose activation multiplies that of `up`, or None.
    """

    up: nn.Linear
    down: nn.Linear
    act: nn.Module
    gate: nn.Linear | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Computes the MLP, (T, O)."""
        hidden_TI = self.up(x_TD)
        return self.down(self.act(hidden_TI) if self.gate is None else self.act(self.gate(x_TD)) * hidden_TI)


def read_mlp(module: nn.Module) -> DenseMLP | None:
    """Reads a module as an MLP of two linear maps, or of three where one is a gate.

    Args:
        module: Its children are linear maps, one activation, and at most others that do nothing.

    Returns:
        The MLP, or None if the module is something else.
    """
    children = list(module.named_children())
    maps = [(name, child) for name, child in children if isinstance(child, nn.Linear)]
    idle = [c for _, c in children if isinstance(c, nn.Identity) or (isinstance(c, nn.Dropout) and c.p == 0)]
    rest = [c for _, c in children if not isinstance(c, nn.Linear) and all(c is not other for other in idle)]
    if len(rest) != 1 or len(maps) not in (2, 3) or any(True for _ in rest[0].parameters()):
        return None
    gates = [child for name, child in maps[:-1] if "gate" in name]
    ups = [child for name, child in maps[:-1] if "gate" not in name]
    if len(ups) != 1 or len(gates) != len(maps) - 2:
        return None
    mlp = DenseMLP(ups[0], maps[-1][1], rest[0], gates[0] if gates else None)
    fits = mlp.up.out_features == mlp.down.in_features
    return mlp if fits and (mlp.gate is None or mlp.gate.weight.shape == mlp.up.weight.shape) else None


def find_mlps(model: nn.Module) -> dict[str, DenseMLP]:
    """Lists the MLPs of the numbered blocks of a model, by path, in the order of the blocks.

    Args:
        model: A timm or transformers model.
    """
    found: dict[str, DenseMLP] = {}
    for path, module in model.named_modules():
        mlp = read_mlp(module) if any(part.isdigit() for part in path.split(".")) else None
        if mlp is not None and mlp.down.out_features == mlp.up.in_features:
            found[path] = mlp
    return found
