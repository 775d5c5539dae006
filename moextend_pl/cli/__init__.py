"""The command line: commands, stages from layered YAML, every mistake as one sentence, `generate`.

`main` and `run` are its face; commands of rooms below are found by name when they are called.
"""

from moextend_pl.cli.commands import main, run

__all__ = ["main", "run"]
