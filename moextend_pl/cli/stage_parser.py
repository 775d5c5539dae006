"""What the parser of a stage may open and import: the files that were asked for, the packages that are allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch.cli import LightningArgumentParser


class StageParser(LightningArgumentParser):
    """Takes every value as it stands: none is tried as the name of a file whose content would take its place."""

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> None:
        # The one door through which arguments of a class come; what is nested in them inherits the option.
        super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})


@contextmanager
def guarded_parsing(packages: Sequence[str]) -> Iterator[None]:
    """Lets parsers import from some packages only, whatever key names the code, and read local files only.

    Args:
        packages: Dotted names; everything below them is allowed.
    """
    # The library keeps these for the whole process, and has no way to take a rule back.
    before = dict(parsing_settings)
    set_parsing_settings(
        config_read_mode_fsspec_enabled=False,
        validate_subclass_spec_in_any=True,  # else a class that may not be imported is kept as a mapping
        import_path_denylist=["*"],
        import_path_allowlist=list(packages),
    )
    try:
        yield
    finally:
        parsing_settings.update(before)
        set_parsing_settings(config_read_mode_fsspec_enabled=True)  # as Lightning sets it when it is imported
