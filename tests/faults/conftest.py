"""A training of one second, and child processes with faults."""

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
    """A command line that runs."""

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
    code: int
    output: str


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        # a run that another test of this process has made is none of the server's
        environment = {name: value for name, value in os.environ.items() if name != "VISIONATTN_RUN"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv, cwd, *, fault: str = "", env: dict[str, str] | None = None) -> Child:
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
"""A task whose steps draw random numbers, and whose policy and baseline change as the training goes on."""

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
"""A task on `DigitScenesData`, whose steps draw a size each."""


def tiny(folder: Path, *, train: int = 24, batch: int = 4, workers: int = 0, model=None, data=None, **trainer) -> Path:
    """Write the config of a training of two epochs, with all that a resumed one must restore."""
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


def steps(path: Path) -> list[list]:
    """Return the steps that `record` has written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start_all(server, count, argv, home, fault="", *, faults=None, slurm=False, strategy=("ddp",)):
    """Start the processes of one run as a cluster does: environment variables give each its rank.

    `faults` has the faults of each process; `slurm` uses the variables of `srun`; `strategy` is a name and its options.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = ["--trainer.accelerator=cpu", f"--trainer.devices={count}"]
    flags += [f"--trainer.strategy={strategy[0]}", *(f"--trainer.strategy.{option}" for option in strategy[1:])]
    return [
        server.start(
            [*argv, *flags],
            home,
            fault=faults[rank] if faults else fault,
            env={**place, **(_slurm if slurm else _torchrun)(rank, count)},
        )
        for rank in range(count)
    ]


def _torchrun(rank: int, count: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(count), "NODE_RANK": "0", "LOCAL_RANK": str(rank), "RANK": str(rank)}


def _slurm(rank: int, count: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    counts = {"SLURM_NTASKS": str(count), "SLURM_NTASKS_PER_NODE": str(count), "SLURM_NNODES": "1"}
    return {**job, **counts, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def undisturbed(server, tmp_path_factory):
    """The same training with nothing happening to it: its run, and what it was shown at every step."""
    return whole(server, tmp_path_factory.mktemp("undisturbed"))


def whole(server, home, **options):
    ended = server.run(["fit", "--config", tiny(home, **options)], home, fault=f"record({str(home / 'steps')!r})")
    assert ended.code == 0, ended.output
    return home / "runs" / "tiny" / "0", {tuple(line[:2]): line for line in steps(home / "steps")}
