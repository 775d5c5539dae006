"""Devices by the names that a command line takes."""

from __future__ import annotations

import torch

from moextend_pl.contracts import UserError


def named_device(name: str, number: int = 0) -> torch.device:
    """Returns a device by its name; for `auto` a GPU if there is one.

    Args:
        name: As torch names it, or `auto`.
        number: Of the GPU that `auto` takes, where there are several.

    Raises:
        UserError: If it is none, or not here.
    """
    if name == "auto":
        many = torch.cuda.device_count() > 1
        return torch.device((f"cuda:{number}" if many else "cuda") if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # which of the two depends on how torch was built
        reason = str(error).splitlines()[0]
        raise UserError(f"Expected --device such as auto, cpu or cuda:0, got {name!r}: {reason} Correct it.") from error
