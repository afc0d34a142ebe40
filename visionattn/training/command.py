"""The verbs fit, validate, test and predict: Lightning's command line with numbered run folders and short errors."""

import atexit
import errno
import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser, capture_parser
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from visionattn.data import ImageData
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import local_path, write_file
from visionattn.tasks import Task, check_num_classes
from visionattn.training.callbacks.metrics_file import MetricsFile
from visionattn.training.callbacks.nan_guard import BestCheckpoint, NaNGuard
from visionattn.training.callbacks.overlay_samples import OverlaySamples
from visionattn.training.callbacks.predictions import WritePredictions
from visionattn.training.callbacks.progress import RunProgress
from visionattn.training.callbacks.report import TestReport
from visionattn.training.callbacks.run_files import is_dev_run
from visionattn.training.callbacks.span_pictures import DrawSpans
from visionattn.training.callbacks.split_lists import WriteSplits
from visionattn.training.checkpoint_io import DurableCheckpointIO
from visionattn.training.checkpoints import SAFETENSORS, DescribeCheckpoint, check_against
from visionattn.training.config_errors import explain
from visionattn.training.hub import PREFIX, fetch
from visionattn.training.resume import Resume
from visionattn.training.run_folders import (
    _RUN,
    RUNS,
    _check_name,
    _lock,
    _new_run,
    _rank,
    _released,
    _remove_empty,
    _remove_unfinished_files,
    _versions,
)
from visionattn.training.third_party_warnings import silence_third_party_warnings

_CONFIG_FLAGS = ("--config", "-c")
UNTRAINED = "untrained"
ACCURACY = "val/accuracy"
Built = TypeVar("Built")
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_SECTIONS: dict[str, Callable[..., object]] = {
    "trainer": L.Trainer,
    "checkpoint": BestCheckpoint,
    "resume": Resume,
    "nan_guard": NaNGuard,
    "overlays": OverlaySamples,
    "report": TestReport,
    **dict.fromkeys(("model", "data", "name", "seed_everything", "test_after_fit", "ckpt_path", "config"), dict),
}


def run_verb(verb: str, arguments: Sequence[str]) -> None:
    """Run one of Lightning's verbs.

    Args:
        verb: fit, validate, test or predict.
        arguments: the command line after the verb.

    Raises:
        UsageError: the configuration or a flag is wrong.
        DataError: a file, folder or checkpoint cannot be used.
    """
    silence_third_party_warnings()
    arguments = find_configs(arguments)
    for index, prefix in _places_of_configs(arguments).items():
        if os.path.isfile(path := arguments[index].removeprefix(prefix)):
            read_yaml(path)  # jsonargparse's message about wrong YAML would not name the file
    try:
        with _released():
            _call_lightning([verb, *arguments])
    except ArgumentError as error:
        raise UsageError(explain(str(error), _SECTIONS)) from error
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        if not _is_from_lightning(error):
            raise
        advice = "; set --trainer.accelerator cpu" if "gpu" in str(error) else ""
        raise UsageError(f"the trainer refuses its options: {' '.join(str(error).split())}{advice}") from error
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise DataError(f"{error.filename or 'the run'} cannot be written: {error.strerror}") from error


def parser_of(verb: str) -> ArgumentParser:
    """Build the parser of one of Lightning's verbs, without running the verb."""
    silence_third_party_warnings()
    subcommands = capture_parser(_call_lightning, [verb])._subcommands_action
    assert subcommands is not None
    return subcommands.choices[verb]


def _call_lightning(arguments: list[str]) -> None:
    verb = arguments[0]

    class OneVerb(Command):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:  # the parser of each verb takes a tenth of a second to build
            return {verb: Command.subcommands()[verb]}

    OneVerb(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        trainer_defaults={"enable_model_summary": False},
        save_config_callback=_SaveConfig,
        seed_everything_default=0,
        parser_kwargs={"exit_on_error": False, "prog": "visionattn", "allow_abbrev": False},
        args=arguments,
    )


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Replace each config `configs/…` that does not exist in the current folder by the file in the package.

    So the configs of an installed package can be used from any folder.

    Args:
        arguments: of the command line.

    Raises:
        UsageError: a config is an address such as s3://bucket, or `configs/…` exists neither in the current folder nor
            in the package.
    """
    places = _places_of_configs(arguments)
    found = list(arguments)
    for index, prefix in places.items():
        found[index] = prefix + _shipped(arguments[index].removeprefix(prefix))
    return found


def _places_of_configs(arguments: Sequence[str]) -> dict[int, str]:
    """Return index → prefix (`--config=` or none) of the arguments that name a config."""
    places = {}
    for index, argument in enumerate(arguments):
        flag, equals, _ = argument.partition("=")
        if index and arguments[index - 1] in _CONFIG_FLAGS:
            places[index] = ""
        elif equals and flag in _CONFIG_FLAGS:
            places[index] = f"{flag}="
    return places


def read_yaml(path: str) -> dict[str, Any]:
    """Read the sections of a config.

    Raises:
        UsageError: the file is not valid YAML, or holds something else than sections.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{place} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no sections such as `trainer:`, but {type(content).__name__}")
    return content


def _shipped(path: str) -> str:
    local_path(path, "--config")
    if os.path.exists(path) or not path.startswith("configs/"):
        return path
    package = Path(__file__).parents[1]
    for home in (package, package.parent):  # configs/ is in the package if installed, and next to it in a checkout
        if (home / path).is_file():
            return str(home / path)
    names = [
        f"configs/{file.relative_to(home / 'configs')}"
        for home in (package, package.parent)
        for file in (home / "configs").rglob("*.yaml")
    ]
    raise UsageError(f"there is no config {path}.{nearest(path, names)}")


class Command(LightningCLI):
    """LightningCLI that writes into runs/<name>/<version>/. Options in a checkpoint never replace the config's."""

    run_folder: Path | None = None
    trained_classes: tuple[str, ...] = ()  # class names of the checkpoint

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Folder of the run in runs/; null for the name of the config file.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Test the best checkpoint after fit, and write its report.",
        )
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": ACCURACY,
                "checkpoint.mode": "max",
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(Resume, "resume")
        parser.add_lightning_class_args(NaNGuard, "nan_guard")
        parser.add_lightning_class_args(OverlaySamples, "overlays")
        parser.add_lightning_class_args(TestReport, "report")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        verb = self.config.subcommand
        options = self.config[verb]
        options.name = options.name or _name_of(options.get("config"))
        if options.trainer.default_root_dir:
            local_path(options.trainer.default_root_dir, "--trainer.default_root_dir")
        _check_name(options.name)
        if verb == "predict" and options.return_predictions is None:
            options.return_predictions = False  # WritePredictions writes them, so do not keep them in memory
        self._check_checkpoint(verb, options)

    def _check_checkpoint(self, verb: str, options: Namespace) -> None:
        path = None if options.ckpt_path is None else str(options.ckpt_path)
        if verb == "fit" and path is None:
            return
        if path is None:
            raise UsageError(
                f"{verb} needs trained weights: give --ckpt_path FILE, or --ckpt_path {UNTRAINED} "
                "for the initial weights"
            )
        if path == UNTRAINED:
            options.ckpt_path = None
            return
        if path.startswith(PREFIX):
            path = options.ckpt_path = fetch(path)
        if verb == "fit" and path.endswith(SAFETENSORS):
            raise UsageError(
                f"fit cannot continue from {path}, which holds weights but not the state of the optimizer; give the "
                ".ckpt file of the run"
            )
        local_path(path, "--ckpt_path")
        if path in ("hpc", "registry") or (verb, path) == ("fit", "best"):
            raise UsageError(f"{verb} needs --ckpt_path FILE or --ckpt_path last, not {path}")
        if path in ("last", "best"):
            path = options.ckpt_path = self._newest(verb, options.name, f"{path}.ckpt")
            if path is None:
                return
        options.weights_only = True
        self.trained_classes = check_against(path, self._plain_config(options)["model"], training=verb == "fit")

    def _newest(self, verb: str, name: str, file: str) -> str | None:
        """Return the checkpoint of the newest run that has this file, or None to start a new training.

        Raises:
            UsageError: no run has this file, and the verb is not fit.
        """
        folders = [Path(os.environ[_RUN])] if _RUN in os.environ else reversed(_versions(name))
        found = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if found is None and verb != "fit":
            raise UsageError(f"no run in {RUNS / name}/ has a {file}; give the path of a checkpoint: --ckpt_path FILE")
        if _rank() == 0:
            fresh = "starts a new training, because no run of this name has a checkpoint"
            source = fresh if found is None else str(found)
            print(f"--ckpt_path {file.removesuffix('.ckpt')}: {source}", file=sys.stderr)
        if found is not None and verb == "fit":
            self.run_folder = found.parent
        return None if found is None else str(found)

    def _plain_config(self, options: Namespace) -> dict[str, Any]:
        parser = self._parser(self.config.subcommand)
        text = parser.dump(options, skip_none=False, format="yaml", skip_validation=True)
        if lost := re.search(r"^ *(\S+): Unable to serialize instance", text, re.M):
            raise UsageError(
                f"{lost[1]} cannot be written into config.yaml and checkpoints; annotate the parameter with a single "
                "type, not with a union of a callable and a list of callables"
            )
        return yaml.safe_load(text)

    def before_instantiate_classes(self) -> None:
        options = self.config[self.config.subcommand]
        if options.checkpoint.monitor == ACCURACY:  # the task's attribute `monitor` may replace the default metric
            module, _, name = options.model.class_path.rpartition(".")
            task = getattr(importlib.import_module(module), name)
            options.checkpoint.monitor = getattr(task, "monitor", ACCURACY)
        if options.trainer.fast_dev_run:  # such a run must leave no files
            folder = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        else:
            self.run_folder = self.run_folder or _new_run(options.name)
            os.environ[_RUN] = folder = str(self.run_folder)
            if self.config.subcommand == "fit" and _rank() == 0:
                _remove_unfinished_files(options.name)
                _lock(self.run_folder)
        loggers = options.trainer.logger
        self.redirected = [  # by default, W&B would write into the current folder
            logger.init_args
            for logger in (loggers if isinstance(loggers, list) else [loggers])
            if str(getattr(logger, "class_path", "")).endswith(".WandbLogger") and logger.init_args.save_dir == "."
        ]
        for arguments in self.redirected:
            arguments.save_dir = folder
        self.own_folder = [
            (part, name)
            for part, name in ((options.trainer, "default_root_dir"), (options.checkpoint, "dirpath"))
            if not getattr(part, name)
        ]
        for part, name in self.own_folder:
            setattr(part, name, folder)

    def instantiate_classes(self) -> None:
        try:
            built(super().instantiate_classes)
            if isinstance(self.model, Task):
                check_num_classes(self.model.network, getattr(self.datamodule, "class_names", ()))
        except BaseException as error:
            if self.run_folder and _rank() == 0:
                _remove_empty(self.run_folder)
            if isinstance(error, DataError):
                raise DataError(f"{self._data_option_of(str(error))}{error}") from error
            raise
        if self.trained_classes and isinstance(self.model, Task):
            self.model.class_names = self.trained_classes  # the task compares them with the data's in `setup`
        for arguments in self.redirected:
            arguments.save_dir = "."  # config.yaml must not contain this run's folder, since it may start other runs

    def _data_option_of(self, message: str) -> str:
        """Return `--data.OPTION VALUE: ` for the option whose file or folder the message names, or ""."""
        options = self.config[self.config.subcommand].data.get("init_args") or {}
        for name, value in vars(options).items():
            # not inside a longer word or path, except the path of a file in the folder
            if isinstance(value, str) and value and re.search(rf"(?<![\w./]){re.escape(value)}(?![\w-])", message):
                return f"--data.{name} {value}: "
        return ""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        options = self.config[self.config.subcommand]
        resume = self._get(self.config_init, "resume")
        resume.folder = self._get(self.config_init, "checkpoint").dirpath
        resume.seed = None if options.seed_everything is False else options.seed_everything
        logger = self._get(self.config_init, "trainer").logger
        if self.run_folder and logger is not False:
            place = {"name": options.name, "version": self.run_folder.name}
            own = [TensorBoardLogger(RUNS, **place)] if logger in (None, True) else logger
            kwargs["logger"] = [MetricsFile(self.run_folder), *(own if isinstance(own, list) else [own])]
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, DurableCheckpointIO()]
        extra: list[Callback] = [DescribeCheckpoint(self._plain_config(options)["model"]), DrawSpans()]
        if self.run_folder:
            extra.append(WriteSplits(self.run_folder / "splits"))
        if self.config.subcommand == "predict":
            extra.append(WritePredictions())
        trainer = self._get(self.config_init, "trainer")
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        if trainer.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            extra.append(RunProgress())
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": extra}
        self.save_config_kwargs = {"folder": self.run_folder}
        built_trainer = super().instantiate_trainer(**kwargs)
        for part, name in self.own_folder:  # not into config.yaml, with which another run would write into this folder
            setattr(part, name, None)
        return built_trainer

    def before_fit(self) -> None:
        if self._get(self.config, "test_after_fit") and isinstance(self.datamodule, ImageData):
            self.datamodule.prepare_data()
            self.datamodule.setup("test")  # raise before the training if the test split is missing

    def after_fit(self) -> None:
        if self._get(self.config, "test_after_fit"):
            checkpoint = self._get(self.config_init, "checkpoint")
            # if training ended before the first validation, there is no best checkpoint: test the current weights
            best = (not is_dev_run(self.trainer) and checkpoint.best_model_path) or None
            # WeightAveraging would test the weights of the last step instead of the averaged weights
            callbacks: list[Callback] = vars(self.trainer)["callbacks"]
            kept = [callback for callback in callbacks if not isinstance(callback, WeightAveraging)]
            vars(self.trainer)["callbacks"] = kept
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, weights_only=True, verbose=False)
        self._say_where()

    def after_test(self) -> None:
        self._say_where()

    def after_validate(self) -> None:
        self._say_where()

    def after_predict(self) -> None:
        self._say_where()

    @rank_zero_only
    def _say_where(self) -> None:
        if left_out := len(getattr(self.datamodule, "skipped", ())):
            print(f"{left_out} image{'s were' if left_out > 1 else ' was'} left out", file=sys.stderr)
        if self.run_folder:
            print(f"run: {self.run_folder}/")


class _SaveConfig(SaveConfigCallback):
    """Write the resolved config into the run's folder, also if there is no logger."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *, folder: Path | None) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.folder:
            text = self.parser.dump(self.config, skip_none=False)
            write_file(self.folder / "config.yaml", text.encode())


def built(build: Callable[[], Built]) -> Built:
    """Call a function that builds the objects of a config, and shorten its errors.

    Args:
        build: the function.

    Raises:
        UsageError, DataError: with the message of the class that could not be built, without jsonargparse's lines.
    """
    try:
        return build()
    except (TypeError, ValueError) as error:
        root: BaseException = error  # jsonargparse wraps the class's error in an error for each type that it tried
        while root.__cause__ is not None and not isinstance(root, (UsageError, DataError)):
            root = root.__cause__
        raise (root if isinstance(root, (UsageError, DataError)) else UsageError(str(root))) from error


def _is_from_lightning(error: Exception) -> bool:
    """Return whether Lightning itself raised an error, and not a function that Lightning called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def _name_of(configs: Sequence[object] | None) -> str:
    return Path(str(configs[-1])).stem if configs else "unnamed"
