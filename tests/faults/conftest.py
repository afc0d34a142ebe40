"""Configs of trainings that take about a second, and a server that runs command lines with injected faults."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@dataclass
class Child:
    """A running command line.

    Attributes:
        server: the server that started the process.
        pid: id of the process, and of its process group.
        out: file with its stdout and stderr.
    """

    server: "Server"
    pid: int
    out: Path

    def wait(self, seconds: float = 120) -> "Ended":
        status = self.server.ask({"wait": self.pid, "seconds": seconds})
        if status is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, self.output)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""


@dataclass
class Ended:
    """A command line that has ended; `code` is the exit code, or minus the number of the signal that killed it."""

    code: int
    output: str


class Server:
    """Start command lines as forks of one process that has imported everything (`tests.faults.server`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request):
        """Send a request and return the answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv, cwd, *, fault: str = "", env: dict[str, str] | None = None) -> Child:
        """Start a command line; `fault` is Python code that runs first, with the names of `tests.faults.injections`."""
        self.count += 1
        out = self.folder / f"{self.count}.txt"
        fault = f"from tests.faults.injections import *\n{fault}"
        request = {"argv": list(map(str, argv)), "cwd": str(cwd), "env": env or {}, "fault": fault, "out": str(out)}
        return Child(self, self.ask(request), out)

    def run(self, argv, cwd, *, seconds: float = 120, **options) -> Ended:
        return self.start(argv, cwd, **options).wait(seconds)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(200)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("children"))
    yield server
    server.close()


GLIMPSES = {
    "class_path": "visionattn.tasks.GlimpseClassification",
    "init_args": {
        "network": {
            "class_path": "visionattn.models.GlimpseNetwork",
            "init_args": {
                "num_classes": 10,
                "num_glimpses": 3,
                "hidden_size": 16,
                "retina": {"class_path": "visionattn.attention.Retina", "init_args": {"patch_size": 8}},
                "encoder": {"class_path": "visionattn.models.ConvEncoder", "init_args": {"widths": [4]}},
                "policy": {"class_path": "visionattn.attention.Gaussian", "init_args": {"std": [0.3, 0.1]}},
            },
        },
        "baseline": "moving_average",
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
}
"""A task whose steps draw random numbers, and whose training state includes a policy and a baseline."""

DETECTION = {
    "class_path": "visionattn.tasks.Detection",
    "init_args": {
        "network": {
            "class_path": "visionattn.models.DenseDetector",
            "init_args": {
                "num_classes": 10,
                "depth": 1,
                "features": {
                    "class_path": "visionattn.models.FeaturePyramid",
                    "init_args": {
                        "backbone": "resnet10t",
                        "options": {"channels": [8, 8, 16, 16], "stem_width": 4},
                        "strides": [8],
                        "channels": 16,
                    },
                },
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "sizes": [48, 64, 80],
    },
}
"""A task for `DigitScenesData` that draws a random image size in every step."""


def write_config(
    folder: Path, *, train: int = 24, batch: int = 4, workers: int = 0, model=None, data=None, **trainer
) -> Path:
    """Write a config of two epochs, with EMA, mixup and a scheduler, whose state a resumed training must restore."""
    config = {
        "name": "tiny",
        "seed_everything": 3,
        "trainer": {
            "max_epochs": 2,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
            ],
            **trainer,
        },
        "model": {
            "class_path": "visionattn.tasks.Classification",
            "init_args": {
                "network": {
                    "class_path": "visionattn.models.ConvNet",
                    "init_args": {
                        "num_classes": 10,
                        "widths": [4, 8],
                        "attention": {"class_path": "visionattn.attention.CBAM", "init_args": {"reduction": 2}},
                    },
                },
                "mixup": 0.4,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.01}},
            },
        },
        "data": {
            "class_path": "visionattn.data.ClutteredDigitsData",
            "init_args": {
                "train_size": train,
                "val_size": 10,
                "test_size": 10,
                "canvas": 40,
                "batch_size": batch,
                "num_workers": workers,
            },
        },
        "overlays": {"every_n_epochs": 0},
    }
    if model is not None:
        config["model"] = model
    if model is DETECTION:
        config["data"]["class_path"] = "visionattn.data.DigitScenesData"
        config["data"]["init_args"] |= {"canvas": 64}
    if data is not None:
        config["data"] = {**data, "init_args": {**data["init_args"], "batch_size": batch, "num_workers": workers}}
        config["model"]["init_args"]["network"]["init_args"]["num_classes"] = len(data["init_args"]["class_names"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def recorded_steps(path: Path) -> list[list]:
    """Return [epoch, batch, rank, paths, hash of the images] of each step that `injections.record` has written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start_all(server, count, argv, home, fault="", *, faults=None, slurm=False, strategy=("ddp",)):
    """Start the processes of one run as a cluster does: environment variables give each process its rank.

    Args:
        server, argv, home: see `Server.start`.
        count: number of processes.
        fault: fault of every process.
        faults: fault of each process, instead of `fault`.
        slurm: set the environment variables of SLURM's `srun` instead of torchrun's.
        strategy: Lightning's strategy: its name, then its options.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = ["--trainer.accelerator=cpu", f"--trainer.devices={count}"]
    flags += [f"--trainer.strategy={strategy[0]}", *(f"--trainer.strategy.{option}" for option in strategy[1:])]
    return [
        server.start(
            [*argv, *flags],
            home,
            fault=faults[rank] if faults else fault,
            env={**address, **(_slurm if slurm else _torchrun)(rank, count)},
        )
        for rank in range(count)
    ]


def _torchrun(rank: int, count: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(count), "NODE_RANK": "0", "LOCAL_RANK": str(rank), "RANK": str(rank)}


def _slurm(rank: int, count: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    counts = {
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS_PER_NODE": str(count),
        "SLURM_NNODES": "1",
    }
    return {**job, **counts, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def free_port() -> int:
    """Return a TCP port that no process uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def uninterrupted(server, tmp_path_factory):
    """The training that `write_config` describes, without a fault: its folder and steps; see `run_without_faults`."""
    return run_without_faults(server, tmp_path_factory.mktemp("uninterrupted"))


def run_without_faults(server, home, **options):
    """Train without a fault; return the run's folder, and (epoch, batch) → recorded step."""
    fault = f"record({str(home / 'steps')!r})"
    ended = server.run(["fit", "--config", write_config(home, **options)], home, fault=fault)
    assert ended.code == 0, ended.output
    return home / "runs" / "tiny" / "0", {tuple(step[:2]): step for step in recorded_steps(home / "steps")}
