"""`fit`, `validate`, `test` and `predict`: one run of one stage, described by layered YAML files."""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moextend_pl.cli.config_errors import explain
from moextend_pl.cli.config_files import ALLOW_OPTION, BASE_KEY, StageArguments, prepare_arguments
from moextend_pl.cli.stage_parser import (
    SaveRunConfig,
    StageParser,
    guarded_parsing,
    place_loggers,
    plain_config,
    replace_plan,
)
from moextend_pl.cli.start import CommonStart
from moextend_pl.cli.trainer_settings import check_settings, check_trainer, our_strategy
from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import remove_leftovers
from moextend_pl.runs.checkpoint import CHECKPOINT_FOLDER, drop_later, peek, written_since
from moextend_pl.runs.interruptions import Notes, Told, count_restarts, job_mark
from moextend_pl.runs.metrics_log import GoesOn, RunLogger, last_steps
from moextend_pl.runs.preflight import (
    check_writable,
    choose_checkpoint,
    only_writer,
    refuse_changed_config,
    run_directory,
    set_aside,
)
from moextend_pl.training.termination import EndTogether, EqualSteps, Watchdog

DEFAULT_SEED = 0
DESCRIPTIONS = {
    "fit": "Trains one stage. Continues from RUN/checkpoints/last.ckpt if it is there.",
    "validate": "Measures the run's last checkpoint on the validation split.",
    "test": "Measures the run's last checkpoint on the test split.",
    "predict": "Writes the answers of the run's last checkpoint.",
}

_log = logging.getLogger(__name__)


class MoExtendCLI(LightningCLI):
    """Lightning's CLI with layered configs, one-line errors and runs that continue by themselves."""

    def __init__(
        self, arguments: StageArguments, held: contextlib.ExitStack | None = None, notes: Notes | None = None
    ) -> None:
        """Parses, builds and runs.

        Args:
            arguments: Command line with its layers spelled out.
            held: What is held while the run lasts, for example its directory.
            notes: What the process was told from outside.

        Raises:
            UserError: For every mistake in it.
        """
        self._arguments = arguments
        self._held = held or contextlib.ExitStack()
        self._notes = notes or Notes()
        self._checkpoint: str | None = None
        self._trial: tempfile.TemporaryDirectory[str] | None = None
        # Abbreviated options would turn a typo into another key without a word.
        options = {"exit_on_error": False, "allow_abbrev": False}
        command = arguments.argv[0]
        described = {command: {**options, "description": DESCRIPTIONS[command]}}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=DEFAULT_SEED,
            parser_kwargs={"prog": "python -m moextend_pl", **options, **described},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=arguments.argv,
            parser_class=StageParser,
            auto_configure_optimizers=False,  # a model owns its optimizer
            load_from_checkpoint_support=False,  # a checkpoint never decides what is built
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Returns the given command alone: the parser of each takes a twentieth of a second, and one is read."""
        command = self._arguments.argv[0]
        return {command: super().subcommands()[command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what this project knows beside Lightning's options."""
        # Layers are spelled out by now; suppressed, so that `--print_config` leaves the key out.
        parser.add_argument(f"--{BASE_KEY}", type=str | list[str] | None, default=None, help=argparse.SUPPRESS)
        parser.add_argument("--plan", type=str | None, help="Extension plan of an extend run, instead of its config's.")
        parser.add_argument("--fresh", action="store_true", help="Ignore the checkpoints of an earlier run.")
        # Taken off the command line before parsing; registered for `--help` only.
        parser.add_argument(ALLOW_OPTION, help="Let configs import from this package too; may be given several times.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line, with every mistake as one line."""
        try:
            self.config = parser.parse_args(self._arguments.argv)
        except argparse.ArgumentError as error:
            command = self._subcommand_parsers.get(self._arguments.argv[0], parser)
            raise UserError(explain(str(error), command, self._arguments)) from error
        check_settings(plain_config(self.config[self.config["subcommand"]]))

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let the checkpoint's settings win over the config's without a word."""

    def before_instantiate_classes(self) -> None:
        """Settles the checkpoint before anything expensive is built."""
        command = str(self.subcommand)
        given = self.config[command]
        if given.get("plan"):
            replace_plan(given, given["plan"])
        config = plain_config(given)
        run = run_directory(config)
        if given.trainer.get("fast_dev_run"):
            # Results of a step or two are none: a stage would go on from them, and another start from them.
            self._trial = tempfile.TemporaryDirectory(prefix="moextend-")
            given.trainer.default_root_dir = self._trial.name
            run = Path(self._trial.name) if command == "fit" else run
            _log.info("`fast_dev_run` is a trial: it begins anew, and what it writes is thrown away")
        place_loggers(given, str(run))
        mark = job_mark(run) if command == "fit" else {}
        fresh, asked = given.get("fresh", False) and not mark, given.get("ckpt_path")
        if mark and written_since(run / CHECKPOINT_FOLDER, mark["since"]):
            asked = None  # the job has gone on from it
        self._checkpoint = choose_checkpoint(run, asked, fresh)
        check_writable(run)
        if command == "fit" and _is_first_rank():
            self._held.enter_context(only_writer(run))
            remove_leftovers(run)
            drop_later(run / CHECKPOINT_FOLDER, self._checkpoint)
            if self._checkpoint is None:
                set_aside(run, config, fresh)
            count_restarts(run, peek(Path(self._checkpoint)).get("global_step", 0) if self._checkpoint else 0)
        if self._checkpoint is None:
            if command != "fit":
                _log.warning("no checkpoint of %s is used: the model is taken as its config builds it", run)
            return
        if command == "fit":
            begun = Path(self._checkpoint).absolute().parent
            if begun.name == CHECKPOINT_FOLDER:
                refuse_changed_config(begun.parent, config, "sources" in peek(Path(self._checkpoint)))
        _log.info("%s from %s", "continuing" if command == "fit" else "weights", self._checkpoint)

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; a mistake noticed by one of them is told without the parser's wrapping."""
        try:
            super().instantiate_classes()
        except (ValueError, ModuleNotFoundError, argparse.ArgumentError) as error:
            mistake = _find_mistake(error)
            if mistake is None:
                raise
            raise UserError(str(mistake)) from error

    def after_instantiate_classes(self) -> None:
        """Hands the chosen checkpoint to the trainer's method."""
        settings = self.config_init[str(self.subcommand)]
        settings["ckpt_path"] = self._checkpoint
        if settings.get("weights_only") is None:
            settings["weights_only"] = True  # never unpickle; Lightning's default depends on where the file lies
        self._notes.hold()  # Lightning starts other processes next

    def after_fit(self) -> None:
        """Refuses to call a run done that trained nothing.

        Raises:
            UserError: If no step was taken, now or before.
        """
        if self.trainer.state.finished and self.trainer.global_step == 0:
            raise UserError(
                "the run took no step, so that nothing was trained or written. Look at `trainer.max_epochs`, "
                "`trainer.limit_train_batches` and the number of samples."
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Builds the trainer; its arguments all come from the user, so its complaints are theirs to mend."""
        goes_on = self.subcommand == "fit" and self._checkpoint is not None
        config["logger"] = _loggers(config.get("logger"), str(config.get("default_root_dir") or "."), goes_on)
        config["strategy"] = our_strategy(config.get("strategy", "auto"))
        try:
            if SLURMEnvironment.detect():
                # Lightning's own requeue saves inside the signal handler, where ranks stand at different places.
                plugins = config.get("plugins") or []
                plugins = plugins if isinstance(plugins, list) else [plugins]
                config["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
            ours: list[Callback] = [CommonStart(self._checkpoint), EqualSteps(), EndTogether(self._notes)]
            named = config.get("callbacks") or []
            named = named if isinstance(named, list) else [named]
            if not any(isinstance(each, Watchdog) for each in named):
                ours.append(Watchdog())
            if config.get("enable_progress_bar") is False:  # an option of this call, where the bar stands in the file
                config["callbacks"] = [each for each in named if not isinstance(each, ProgressBar)]
            trainer = super()._instantiate_trainer(config, [*callbacks, *ours])
        except (MisconfigurationException, ModuleNotFoundError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"the trainer refuses its settings: {error}") from error
        check_trainer(trainer, config.get("precision"))
        for saves in trainer.checkpoint_callbacks:
            if isinstance(saves, ModelCheckpoint) and saves.dirpath is None:  # Lightning takes the first logger's place
                saves.dirpath = str((Path(trainer.default_root_dir) / CHECKPOINT_FOLDER).absolute())
        return trainer


def _is_first_rank() -> bool:
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _find_mistake(error: BaseException | None) -> Exception | None:
    """Returns the user's mistake among the causes of an error: the parser wraps what a class raises when built."""
    while error is not None:
        if isinstance(error, UserError | MisconfigurationException | ModuleNotFoundError):
            return error
        error = error.__cause__ or error.__context__
    return None


def run_stage(argv: Sequence[str], notes: Notes) -> MoExtendCLI | int:
    """Runs one of the stage commands.

    Args:
        argv: Command and options.
        notes: What the process is told from outside.

    Returns:
        The finished CLI, or 0 if only help or the config was printed.

    Raises:
        UserError: For every mistake that the user can mend, or if a data worker died.
        KeyboardInterrupt: If the run was interrupted from the keyboard.
        Told: If it was told to end.
    """
    try:
        arguments = prepare_arguments(argv)
        with contextlib.ExitStack() as held, guarded_parsing(arguments.packages):
            return MoExtendCLI(arguments, held, notes)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except Told:
        _log.warning(
            "ended by %s; the same command continues where it stopped", notes.told or "what another rank heard"
        )
        notes.let_launcher_go_first()
        raise
    except RuntimeError as error:
        # How torch tells of data workers, at any place of the main process, has no class of its own.
        if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        if notes.told:  # and its workers with it
            raise Told from error
        raise UserError(
            f"A process that reads data has died, most often for want of memory, or stood still: {error}. Lower "
            "`num_workers` of the data module; the same command continues where it stopped."
        ) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if error.code in (0, None):  # --help and --print_config
            return 0
        raise


def _loggers(asked: Any, run: str, goes_on: bool) -> Any:
    """Returns the loggers asked for beside that of `metrics.csv`, which pages and plots read; none if `false`."""
    if asked is False:
        return False
    others = [] if asked in (None, True) else asked if isinstance(asked, list) else [asked]
    for each in others:
        if goes_on and isinstance(each, GoesOn):
            each.known = last_steps(Path(run))
    # The table comes last: what stands there has been told to all others.
    return [*others, *([] if any(isinstance(each, RunLogger) for each in others) else [RunLogger(run)])]
