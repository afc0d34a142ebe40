"""Compare `visionattn fit` on a folder of photographs with a plain PyTorch loop: images a second, and the first step.

    python tests/benchmarks/training.py [--json FILE] [--rows NAME ...] [--rounds N] [--steps N] [--clock wall|cpu]
        [--threads N] [--device cuda]

Both train the same timm model without pretrained weights, on JPEGs of 640 × 480 in two class folders, in batches of 16,
with the same albumentations pipeline (a random crop resized to 224, and flips), AdamW and the same number of threads.

- `fit_images_per_s_MODEL_wN`: images a second of `visionattn fit` ÷ those of the plain loop, with N worker processes,
  from the third step of an epoch on.
- `fit_first_step_MODEL_wN`: time of `visionattn fit` from the start of the process to the end of the first step ÷ that
  of the plain loop.

Every run is a process of its own. The processes run in turns, and a value is the median over the rounds. With `--clock
cpu`, time is the CPU time of a process and its workers: take it if other programs use the same cores. `SPEED` and
`FIRST` are the project's goals.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = {"resnet18": "resnet18", "vit_ti": "vit_tiny_patch16_224"}
BATCH, SIZE = 16, 224
SPEED, FIRST = 0.95, 1.15  # goals
ROWS = [(kind, model, workers) for kind in ("images_per_s", "first_step") for model in MODELS for workers in (0, 2)]


class Clock:
    """The time of each step, as wall time since the start of the process, and as CPU time of it and its workers."""

    def __init__(self):
        self.steps = []

    def tick(self):
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.steps.append((time.time() - started(), cpu_time()))


def started():
    """Return the time at which this process started, in seconds since the epoch."""
    since_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + since_boot


def cpu_time():
    """Return the CPU time of this process and its children, in seconds."""
    total = time.process_time()
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def transforms():
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    return [A.RandomResizedCrop(size=(SIZE, SIZE), scale=(0.4, 1.0)), A.HorizontalFlip()]


def plain(folder, model_name, workers, steps, device):
    """Train with a plain loop, as tutorials of PyTorch write it, and print the times of the steps."""
    clock = Clock()
    pipeline = transforms()
    import albumentations as A
    import cv2
    import timm
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, Dataset

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    compose = A.Compose([*pipeline, A.Normalize()])

    class Photographs(Dataset):
        def __init__(self):
            self.files = [(str(path), label) for label in (0, 1) for path in sorted((folder / f"k{label}").iterdir())]

        def __len__(self):
            return len(self.files)

        def __getitem__(self, index):
            path, label = self.files[index]
            picture = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
            return torch.from_numpy(compose(image=picture)["image"].transpose(2, 0, 1)).contiguous(), label

    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=2).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    options = {"num_workers": workers, "drop_last": True, "pin_memory": device == "cuda"}
    loader = DataLoader(Photographs(), BATCH, shuffle=True, **options)
    for images, labels in itertools.islice(loader, steps):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.tick()
    print(json.dumps(clock.steps))


def fit(folder, model_name, workers, steps, device):
    """Train with `visionattn fit`; `StepClock` prints the steps."""
    from visionattn.cli import main

    config = {
        "name": "speed",
        "trainer": {
            "max_epochs": 1,
            "accelerator": "gpu" if device == "cuda" else "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "limit_train_batches": steps,
            "limit_val_batches": 0,
            "callbacks": [{"class_path": "tests.benchmarks.training_clock.StepClock"}],
        },
        "model": {
            "class_path": "visionattn.tasks.Classification",
            "init_args": {
                "network": {
                    "class_path": "visionattn.models.Classifier",
                    "init_args": {"backbone": model_name, "num_classes": 2, "pretrained": False},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
            },
        },
        "data": {
            "class_path": "visionattn.data.ImageFolderData",
            "init_args": {
                "root": str(folder),
                "batch_size": BATCH,
                "num_workers": workers,
                "val_fraction": 0.01,
                "preprocess": {"size": SIZE},
                "augment": {
                    "class_path": "visionattn.data.transforms.Augmentation",
                    "init_args": {
                        "transforms": [
                            {
                                "class_path": "albumentations.RandomResizedCrop",
                                "init_args": {"size": [SIZE, SIZE], "scale": [0.4, 1.0]},
                            },
                            {"class_path": "albumentations.HorizontalFlip"},
                        ]
                    },
                },
            },
        },
    }
    Path("speed.yaml").write_text(json.dumps(config))  # JSON is YAML
    assert main(["fit", "--config", "speed.yaml"]) == 0


def run(kind, folder, model, workers, options):
    """Run one training in a new process, and return the time of each step: (wall, CPU)."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": os.pathsep.join(map(str, sys.path[1:])),
    }
    environment["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{environment['PYTHONPATH']}"
    arguments = [kind, str(folder), MODELS[model], str(workers), str(options.steps), options.device]
    command = [sys.executable, __file__, "--child", *arguments]
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


def measure(folder, model, workers, options):
    """Return medians over rounds: the two ratios, and for "fit" and "plain" the images a second and the first step."""
    column = 0 if options.clock == "wall" else 1
    rates, firsts = {"fit": [], "plain": []}, {"fit": [], "plain": []}
    for _ in range(options.rounds):
        for kind in ("plain", "fit"):
            steps = [step[column] for step in run(kind, folder, model, workers, options)]
            firsts[kind].append(steps[0])
            rates[kind].append((len(steps) - 2) * BATCH / (steps[-1] - steps[1]))
    return (
        statistics.median(ours / theirs for ours, theirs in zip(rates["fit"], rates["plain"], strict=True)),
        statistics.median(ours / theirs for ours, theirs in zip(firsts["fit"], firsts["plain"], strict=True)),
        {kind: (statistics.median(rates[kind]), statistics.median(firsts[kind])) for kind in rates},
    )


def make_photographs(folder, steps):
    """Write enough JPEGs for the batches, and a few more for the validation, in two class folders."""
    from tests.benchmarks.export import make_images

    for label in (0, 1):
        (folder / f"k{label}").mkdir()
        make_images(folder / f"k{label}", steps * BATCH // 2 + 6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run, at least 4 (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, folder, model, workers, steps, device = options.child
        (fit if kind == "fit" else plain)(Path(folder), model, int(workers), int(steps), device)
        return
    names = {f"fit_{kind}_{model}_w{workers}": (kind, model, workers) for kind, model, workers in ROWS}
    chosen = options.rows or list(names)
    measured, results = {}, []
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), options.steps)
        for name in chosen:
            kind, model, workers = names[name]
            if (model, workers) not in measured:
                measured[model, workers] = measure(Path(folder), model, workers, options)
            rate, first, medians = measured[model, workers]
            value, goal, better = (rate, SPEED, "higher") if kind == "images_per_s" else (first, FIRST, "lower")
            place, unit = (0, "images/s") if kind == "images_per_s" else (1, "s")
            results.append({"name": name, "value": round(value, 4), "goal": goal, "better": better})
            verdict = "ok" if (value >= goal if better == "higher" else value <= goal) else "MISSED"
            sign = "≥" if better == "higher" else "≤"
            ours, theirs = medians["fit"][place], medians["plain"][place]
            print(
                f"{name:30s} {value:7.3f}  {sign} {goal}  {verdict:6s}  {ours:.2f} and {theirs:.2f} {unit}", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
