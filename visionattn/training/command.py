"""The verbs fit, validate, test and predict: Lightning's command line with numbered run folders, safe checkpoints and
errors of one sentence."""

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
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from visionattn.data import ImageData
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import write_file
from visionattn.training.callbacks.metrics_file import MetricsFile
from visionattn.training.callbacks.nan_guard import BestCheckpoint, NaNGuard
from visionattn.training.callbacks.overlay_samples import OverlaySamples
from visionattn.training.callbacks.predictions import WritePredictions
from visionattn.training.callbacks.report import TestReport
from visionattn.training.callbacks.run_files import is_dev_run
from visionattn.training.callbacks.span_pictures import DrawSpans
from visionattn.training.checkpoint_io import DurableCheckpointIO
from visionattn.training.checkpoints import DescribeCheckpoint, check_against
from visionattn.training.config_errors import explain
from visionattn.training.resume import Resume
from visionattn.training.run_folders import _HELD, _RUN, RUNS, _lock, _new_run, _rank, _versions
from visionattn.training.third_party_warnings import silence_third_party_warnings

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
    try:
        _call_lightning([verb, *find_configs(arguments)])
    except ArgumentError as error:
        raise UsageError(explain(str(error), _SECTIONS)) from error
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise DataError(f"{error.filename or 'the run'} cannot be written: {error.strerror}") from error
    finally:
        while _HELD:
            _HELD.pop().close()


def parser_of(verb: str) -> ArgumentParser:
    """Build the parser of one of Lightning's verbs, without running the verb."""
    silence_third_party_warnings()
    subcommands = capture_parser(_call_lightning, [verb])._subcommands_action
    assert subcommands is not None
    return subcommands.choices[verb]


def _call_lightning(arguments: list[str]) -> None:
    Command(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        trainer_defaults={"enable_model_summary": False},
        save_config_callback=_SaveConfig,
        seed_everything_default=0,
        parser_kwargs={"exit_on_error": False, "prog": "visionattn"},
        args=arguments,
    )


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Replace each `configs/…` that the current folder lacks by the file in the package.

    So an installed package runs the shipped configs from any folder.

    Args:
        arguments: of the command line.

    Raises:
        UsageError: the package has no such config either.
    """
    found = []
    expects_file = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if expects_file:
            found.append(_shipped(argument))
        elif equals and flag in ("--config", "-c"):
            found.append(f"{flag}={_shipped(value)}")
        else:
            found.append(argument)
        expects_file = argument in ("--config", "-c")
    return found


def _shipped(path: str) -> str:
    if os.path.exists(path) or not path.startswith("configs/"):
        return path
    package = Path(__file__).parents[1]
    for home in (package, package.parent):  # of a wheel; of a checkout
        if (home / path).is_file():
            return str(home / path)
    names = [
        f"configs/{file.relative_to(home / 'configs')}"
        for home in (package, package.parent)
        for file in (home / "configs").rglob("*.yaml")
    ]
    raise UsageError(f"there is no config {path}.{nearest(path, names)}")


class Command(LightningCLI):
    """LightningCLI that writes a run into runs/<name>/<version>/; checkpoints never override the command line."""

    run_folder: Path | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="Folder of the run under runs/; null for the config's name."
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After fit, test the best checkpoint and write its report.",
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
        if verb == "predict" and options.return_predictions is None:
            options.return_predictions = False  # a callback writes them, so memory need not hold them
        self._check_checkpoint(verb, options)

    def _check_checkpoint(self, verb: str, options: Namespace) -> None:
        path = options.ckpt_path
        if verb == "fit" and path is None:
            return
        if path is None:
            raise UsageError(
                f"{verb} needs trained weights: give --ckpt_path FILE, or --ckpt_path {UNTRAINED} "
                "to run with the initial weights"
            )
        if path == UNTRAINED:
            options.ckpt_path = None
            return
        if "://" in str(path):
            raise UsageError(f"--ckpt_path takes a file on this machine, not an address: download {path} first")
        if path in ("hpc", "registry") or (verb, path) == ("fit", "best"):
            raise UsageError(f"{verb} takes --ckpt_path FILE or --ckpt_path last, not {path}")
        if path in ("last", "best"):
            path = options.ckpt_path = self._newest(verb, options.name, f"{path}.ckpt")
            if path is None:
                return
        options.weights_only = True
        check_against(path, self._plain_config(options)["model"], training=verb == "fit")

    def _newest(self, verb: str, name: str, file: str) -> str | None:
        """Return the checkpoint of the newest run that has one; None starts a new training.

        Raises:
            UsageError: no run has one, and the verb is not fit.
        """
        folders = [Path(os.environ[_RUN])] if _RUN in os.environ else reversed(_versions(name))
        found = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if found is None and verb != "fit":
            raise UsageError(f"no run in {RUNS / name}/ has a {file}; give the file: --ckpt_path FILE")
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
                f"{lost[1]} cannot be written into config.yaml and checkpoints; annotate the parameter with one type "
                "instead of a union of a callable and a list of callables"
            )
        return yaml.safe_load(text)

    def before_instantiate_classes(self) -> None:
        options = self.config[self.config.subcommand]
        if options.checkpoint.monitor == ACCURACY:  # a task may set another metric by its attribute `monitor`
            module, _, name = options.model.class_path.rpartition(".")
            task = getattr(importlib.import_module(module), name)
            options.checkpoint.monitor = getattr(task, "monitor", ACCURACY)
        if options.trainer.fast_dev_run:  # leaves no files
            folder = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        else:
            self.run_folder = self.run_folder or _new_run(options.name)
            os.environ[_RUN] = folder = str(self.run_folder)
            if self.config.subcommand == "fit" and _rank() == 0:
                _lock(self.run_folder)
        loggers = options.trainer.logger
        self.redirected = [  # W&B would write into the current folder
            logger.init_args
            for logger in (loggers if isinstance(loggers, list) else [loggers])
            if str(getattr(logger, "class_path", "")).endswith(".WandbLogger") and logger.init_args.save_dir == "."
        ]
        for arguments in self.redirected:
            arguments.save_dir = folder
        options.trainer.default_root_dir = options.trainer.default_root_dir or folder
        options.checkpoint.dirpath = options.checkpoint.dirpath or folder

    def instantiate_classes(self) -> None:
        built(super().instantiate_classes)
        for arguments in self.redirected:
            arguments.save_dir = "."  # restored for the saved config, since the next run has another folder

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        options = self.config[self.config.subcommand]
        resume = self._get(self.config_init, "resume")
        resume.folder = options.checkpoint.dirpath
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
        if self.config.subcommand == "predict":
            extra.append(WritePredictions())
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": extra}
        self.save_config_kwargs = {"folder": self.run_folder}
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        if self._get(self.config, "test_after_fit") and isinstance(self.datamodule, ImageData):
            self.datamodule.prepare_data()
            self.datamodule.setup("test")  # a missing test split is reported before the training, not after

    def after_fit(self) -> None:
        if self._get(self.config, "test_after_fit"):
            checkpoint = self._get(self.config_init, "checkpoint")
            # a training that ended before its first validation has no best checkpoint: its current weights are tested
            best = (not is_dev_run(self.trainer) and checkpoint.best_model_path) or None
            # WeightAveraging would restore the weights of the last step in place of their average
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
    """Write the resolved config into the run's folder, independently of the loggers."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *, folder: Path | None) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.folder:
            text = self.parser.dump(self.config, skip_none=False)
            write_file(self.folder / "config.yaml", text.encode())


def built(build: Callable[[], Built]) -> Built:
    """Call a function that builds the objects of a config.

    Args:
        build: the function.

    Raises:
        UsageError, DataError: the class's own error message, without the lines that jsonargparse adds.
    """
    try:
        return build()
    except (TypeError, ValueError) as error:
        root: BaseException = error  # jsonargparse wraps the error of the class in one for every type that it tried
        while root.__cause__ is not None:
            root = root.__cause__
        raise (root if isinstance(root, (UsageError, DataError)) else UsageError(str(root))) from error


def _name_of(configs: Sequence[object] | None) -> str:
    return Path(str(configs[-1])).stem if configs else "unnamed"
