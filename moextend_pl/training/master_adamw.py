"""AdamW for parameters in half precision.

A bf16 number has 8 bits of mantissa: a step of 2e-5 on a weight of 0.02 is less than half of its last bit
and would be rounded away, again and again. So moments and a master copy of each parameter are kept in
fp32, and the parameter is the rounded master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from moextend_pl.runs.sharded import local

STATE = ("master", "exp_avg", "exp_avg_sq")


class MasterAdamW(Optimizer):
    """AdamW whose master copies and moments are fp32, whatever the type of the parameters.

    Args:
        params: Parameters to learn, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        weight_decay: Decoupled weight decay.

    Attributes:
        found_inf: A scalar of fp32 on the device; where it is 1 a step changes nothing.

    Source: Mixed precision training, arXiv 1710.03740, section 3.1.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: Computes loss and gradients, if they are not there yet.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(group, parameters)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        states = [self._state_of(p) for p in parameters]
        # Each number is updated by itself: of what is sharded a rank updates its part.
        masters: list[Tensor] = [local(state["master"]) for state in states]
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            [local(p.grad).float() for p in parameters if p.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, master in zip(parameters, masters, strict=True):
            local(parameter).copy_(master)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            master = parameter.detach().float().clone()
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update(master=master, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state in fp32, on the devices of the parameters.

        torch would round it to the type of the parameters, and leave the counters of steps on the CPU, where a file is
        read to; the fused update reads them on the device.

        Args:
            state_dict: As returned by `state_dict`.
        """
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name in (*STATE, "step") if number in state_dict["state"] else ():
                self.state[parameter][name] = state_dict["state"][number][name].to(parameter.device).clone()
