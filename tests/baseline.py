# ruff: noqa: B023 - each closure is called before its loop goes on
"""Figures that the rebuilding of the house must not change: `python -m tests.baseline` prints what differs from
`baseline.json`, which was recorded before the first file moved. Both files go when the third step has ended.

    python -m tests.baseline              compare the hashes of heatmaps, arrays, pictures and the page's numbers
    python -m tests.baseline --write      record them again
    python -m tests.baseline --counts     print the counts of tests, assertions and lines

Hashes hold on one kind of processor with one version of torch: `environment` in the file says which.
"""

import argparse
import ast
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
CHECKS = {
    "assert_close",
    "assert_allclose",
    "assert_array_equal",
    "assert_array_almost_equal",
    "raises",
    "warns",
    "assert_equal",
}


def digest(value):
    """Hash arrays, tensors, files and whatever holds them, by content."""
    import numpy as np
    import torch

    state = hashlib.blake2b(digest_size=8)

    def feed(one):
        if isinstance(one, torch.Tensor):
            one = one.detach().cpu().numpy()
        if isinstance(one, (np.ndarray, np.generic)):
            one = np.ascontiguousarray(one)
            state.update(f"{one.dtype}{one.shape}".encode() + one.tobytes())
        elif isinstance(one, bytes):
            state.update(one)
        elif dataclasses.is_dataclass(one):
            for field in dataclasses.fields(one):
                feed(getattr(one, field.name))
        elif isinstance(one, dict):
            for key in sorted(one, key=str):
                feed(str(key))
                feed(one[key])
        elif isinstance(one, (list, tuple)):
            state.update(f"[{len(one)}".encode())
            for part in one:
                feed(part)
        else:
            state.update(repr(one).encode())

    feed(value)
    return state.hexdigest()


def models():
    import timm
    import torch

    from visionattn.attention import CBAM, Gaussian, Retina, insert
    from visionattn.models import DenseDetector, FeaturePyramid, GlimpseNetwork, MLPEncoder, QueryDetector

    def stirred(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    gain = 2.0 if "qkv" in name else 1.0
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator) * gain / parameter[0].numel() ** 0.5
                    )
        return model.eval()

    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=7, class_token=True
    )
    network = timm.create_model("resnet10t", channels=(8, 16, 32, 32), num_classes=7)
    insert(network, CBAM, image=torch.zeros(1, 3, 64, 64), preserve=False)
    glimpses = GlimpseNetwork(7, retina=Retina(8, scales=2), policy=Gaussian, encoder=MLPEncoder, num_glimpses=3)
    small = {"channels": (8, 16, 24, 32), "stem_width": 4, "layers": (1, 1, 1, 1)}
    pyramid = FeaturePyramid("resnet10t", channels=32, options=small)
    detectors = {
        "dense": DenseDetector(pyramid, 4, depth=1),
        "query": QueryDetector(pyramid, 4, queries=20, layers=2, heads=4, points=2, hidden=32, depth=1, noised=20),
    }
    found = {"vit": stirred(vit), "cnn": stirred(network), "glimpses": glimpses.eval()}
    return found, {name: stirred(detector, 1) for name, detector in detectors.items()}


def photo(height=60, width=100, seed=0):
    import numpy as np

    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 12), -(-width // 12), 3), dtype=np.uint8)
    return coarse.repeat(12, 0).repeat(12, 1)[:height, :width].copy()


def hashes():
    """Name → hash."""
    import numpy as np
    import torch
    from PIL import Image
    from rich.console import Console

    import visionattn as va
    from visionattn.capture import FullAttention, capture
    from visionattn.data import Preprocess
    from visionattn.errors import DataError, UsageError
    from visionattn.evaluation import CentreGaussian, Edges, RandomMap
    from visionattn.explorer.analysis import analyse
    from visionattn.maps import METHODS
    from visionattn.maps.boxes import BOX_METHODS, MaxOverBoxes
    from visionattn.maps.selection import methods_that_fit
    from visionattn.overlays.explainer import Explainer
    from visionattn.overlays.folder.export import export

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    preprocess = Preprocess((64, 64))
    pictures = [photo(), photo(90, 70, 1), photo(64, 64, 2)]
    found = {}
    networks, detectors = models()
    names = tuple("abcdefg")

    def keep(name, make):
        try:
            value = make()
        except (UsageError, DataError) as error:
            found[name] = f"{type(error).__name__}"
        else:
            found[name] = digest(value)

    for label, model in networks.items():
        for name in METHODS:

            def seen(name=name, model=model):
                maps = va.heatmap(model, pictures, method=name, preprocess=preprocess, class_names=names)
                return [[one.values, one.overlay(), one.peak, one.prediction, one.source] for one in maps]

            keep(f"{label}/{name}", seen)
        image = torch.from_numpy(preprocess(pictures[0])[0])[None]
        for control in (RandomMap((4, 4)), CentreGaussian(), Edges((4, 4))):
            keep(f"{label}/control {control.name}", lambda control=control, model=model: control(model, image).heatmaps)

        def records(model=model):
            with torch.no_grad(), capture(model, FullAttention()) as seen:
                model(image)
            return [[one.weights, one.boxes, one._repr_png_()] for one in seen] + [seen._repr_png_()]

        keep(f"{label}/records", records)
        keep(
            f"{label}/explorer",
            lambda model=model: analyse(model, image, methods_that_fit(model, image), steps=4, batch_size=8),
        )
        keep(
            f"{label}/page",
            lambda model=model: va.explore(
                model, pictures, preprocess=preprocess, steps=3, class_names=names, model_name=label
            ).html.partition('<script type="application/json"')[2],
        )

    def exported(model, folder, kinds, **options):
        view = Explainer(model, preprocess, class_names=names, **options)
        views = options.pop("views", view)
        summary = export(
            [source], folder, views, save=kinds, batch_size=2, workers=1, console=Console(quiet=True), **exporting
        )
        lines = []
        for line in (Path(folder) / "manifest.jsonl").read_text().splitlines():
            entry = json.loads(line)
            entry = {
                key: value
                for key, value in entry.items()
                if key not in ("source", "modified", "fingerprint", "seconds")
            }
            for look in entry.get("explanations", []):
                look.pop("seconds")
            lines.append(entry)
        files = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name != "manifest.jsonl":
                if path.suffix == ".npz":
                    with np.load(path) as arrays:
                        files[path.name] = {key: arrays[key] for key in arrays.files}
                else:
                    files[path.name] = path.read_bytes()
        return summary.written, lines, files

    with tempfile.TemporaryDirectory() as home:
        source = os.path.join(home, "in")
        os.mkdir(source)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(os.path.join(source, f"{number}.png"))
        plain = ("overlay", "contour", "spotlight", "side", "heatmap", "mask", "array")
        for label, model in networks.items():
            for kind in (*plain, "gaze", "animation"):
                exporting = {}
                method = METHODS["gaze"]() if label == "glimpses" else METHODS["gradcam"]()
                keep(
                    f"{label}/output {kind}",
                    lambda model=model, kind=kind, label=label, method=method: exported(
                        model, os.path.join(home, label, kind), [kind], method=method
                    ),
                )
        for label, detector in detectors.items():
            for name, method in BOX_METHODS.items():
                try:
                    explain = MaxOverBoxes(method(), min_score=0.0, max_boxes=4)
                except (TypeError, UsageError):
                    continue
                for kind in ("boxes", "overlay", "array"):
                    keep(
                        f"{label}/{name} {kind}",
                        lambda detector=detector, kind=kind, label=label, name=name, explain=explain: exported(
                            detector, os.path.join(home, label, name, kind), [kind], method=explain
                        ),
                    )
        two = [
            Explainer(networks["vit"], preprocess, METHODS["rollout"](), names, name="first"),
            Explainer(networks["vit"], preprocess, METHODS["chefer"](), names, name="second"),
        ]
        for compare, kinds in ((True, ("overlay", "difference", "array")), (False, ("overlay", "array"))):
            exporting = {"compare": compare}

            def both(kinds=kinds, compare=compare):
                folder = os.path.join(home, f"two {compare}")
                export(
                    [source], folder, two, save=kinds, batch_size=2, workers=1, console=Console(quiet=True), **exporting
                )
                return {path.name: path.read_bytes() for path in Path(folder).glob("*.jpg")}

            keep(f"two views, compared {compare}", both)
    return found


def environment():
    import torch

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": model.partition(": ")[2]}


def checks(tree):
    """Assertions in a file: `assert` and calls that fail by themselves."""
    count = 0
    for node in ast.walk(tree):
        count += isinstance(node, ast.Assert)
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            count += name in CHECKS
    return count


def counts():
    """Counts of tests, assertions and lines."""
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]
    package = sorted((ROOT / "visionattn").rglob("*.py"))
    trees = [ast.parse(path.read_text()) for path in tests]
    functions = [
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return {
        "test ids": sum("::" in line for line in listed.splitlines()),
        "test functions": len(functions),
        "assertions": sum(map(checks, trees)),
        "test files": sum(path.name.startswith("test_") for path in tests),
        "lines of the package": sum(len(path.read_text().splitlines()) for path in package),
        "lines of tests": sum(len(path.read_text().splitlines()) for path in tests),
        "modules": len(package),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--counts", action="store_true")
    options = parser.parse_args()
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if options.counts:
        print(json.dumps({"before": kept.get("counts"), "now": counts()}, indent=1))
        return 0
    now = hashes()
    if options.write:
        kept |= {"environment": environment(), "hashes": now, "counts": counts()}
        FILE.write_text(json.dumps(kept, indent=1) + "\n")
        return 0
    if kept["environment"] != environment():
        print(f"recorded on {kept['environment']}, this is {environment()}: hashes may differ")
    before = kept["hashes"]
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    for name in differing:
        print(f"{name}: {before.get(name)} → {now.get(name)}")
    print(f"{len(before)} hashes, {len(differing)} differ")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
