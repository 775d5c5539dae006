"""The package's two other top-level names are common ones: another package's must not stand in for ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from moextend_pl.contracts import UserError

OURS = ("callbacks", "datamodules")


def check_neighbours() -> None:
    """Refuses to run with packages of others under our names, which would fail somewhere far from the cause.

    Raises:
        UserError: If Python finds another package, or none, of one of these names.
    """
    home = Path(__file__).resolve().parents[2]
    for name in OURS:
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if found != home / name:
            where = "none" if found is None else f"another one at {found}"
            raise UserError(
                f"Expected the package `{name}` of moextend_pl in {home}, found {where}. Run from a folder without "
                f"`{name}`, or uninstall or rename the other one; then reinstall moextend_pl."
            )
