"""What stays in single precision in a model of half precision.

transformers loads a model in 16 bits but for a few tensors that need more: rotary frequencies, and the selection bias
of some routers. Lightning's `bf16-true` then casts the whole module, these tensors too, and positions and choices of
experts would no longer be those of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]


def exact_places(model: nn.Module) -> list[Place]:
    """Lists module and name of every tensor that is in fp32 although the default type is a shorter one."""
    if torch.get_default_dtype() == torch.float32:
        return []
    return [
        (module, name)
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.dtype == torch.float32
    ]


def apply_but_for(places: list[Place], apply: Callable[[], object], fn: Callable[[Tensor], Tensor]) -> None:
    """Moves or casts a module; the named tensors are moved only.

    Args:
        places: From `exact_places`.
        apply: Applies `fn` to the whole module.
        fn: As `nn.Module._apply` takes it: casts floating tensors, moves all.
    """
    kept = [getattr(module, name).detach() for module, name in places]
    apply()
    for (module, name), tensor in zip(places, kept, strict=True):
        # As bytes it is no floating tensor, and is moved only.
        getattr(module, name).data = fn(tensor.view(torch.uint8)).view(tensor.dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Builds what is built inside in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
