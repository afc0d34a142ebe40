"""READMEs: commands and code run from top to bottom in one folder, links lead to files, and tables match the code."""

import ast
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image

from tests.commands.command_line import FakeMNIST
from tests.conftest import CONFIGS, SMALL
from tests.data.annotated import voc
from tests.data.tables.labelled import label_table
from tests.maps import glimpses
from tests.maps.test_targets import clip
from tests.models.detectors import small
from tests.overlays.folder.films import film
from visionattn.attention import CBAM
from visionattn.cli import _VERBS, main
from visionattn.maps import METHODS, default_box_method, default_method
from visionattn.models import ConvNet
from visionattn.overlays import OUTPUTS

ROOT = CONFIGS.parent
PAGES = [
    *("README.md", "CONTRIBUTING.md", "data/README.md"),
    *(
        str(path.relative_to(ROOT))
        for folder in ("visionattn", "configs")
        for path in sorted((ROOT / folder).glob("*/README.md"))
    ),
]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
ELSEWHERE = {
    "python -m pip install": ".ci/run installs the package, and test_package.py builds the wheel",
    "--devices 2": "tests/commands/test_overlay.py runs the commands of overlays/README.md",
    "torchrun": "tests/faults/test_resume.py",
    "srun": "tests/faults/test_resume.py sets the environment variables of SLURM",
    "hf://": "tests/training/test_hub.py",
    "visionattn push": "tests/commands/test_push.py",
}
"""Part of a command → the test that runs this command; `test_command_of_a_readme_runs` skips it."""
SHORT = [
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"),
    *("--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    *("--trainer.check_val_every_n_epoch=1", "--data.num_workers=0", "--data.batch_size=4"),
]
FOLDER = ["--data.root=my_images", "--model.network.num_classes=5"]
BOXES = [
    "--data.root=my_boxes",
    "--data.preprocess.size=64",
    "--test_after_fit=false",
    "--trainer.check_val_every_n_epoch=1",
]
TOKENS = {"input_ids": torch.tensor([[3, 7, 49]])}
SMALLER = {"vit_small_patch16_224": "test_vit", "resnet50": "test_resnet"}
SMALLER_IMAGES = {"randn(12, 3, 224, 224)": "randn(12, 3, 64, 64)", "[60.0, 60, 160, 160]": "[20.0, 20, 45, 45]"}


def commands():
    """Yield (page, command) for every command of an indented block, with lines joined and comments removed."""
    for page, text in TEXTS.items():
        if page == "visionattn/overlays/README.md":
            continue  # tests/commands/test_overlay.py runs these commands
        lines = re.sub(r"```.*?```", "", text, flags=re.S).split("\n")
        block = "\n".join(line[4:] for line in lines if line.startswith("    "))
        for line in block.replace("\\\n", "").split("\n"):
            if re.match(r"(visionattn|python|torchrun|srun|pipx) ", line):
                yield page, shlex.join(shlex.split(line, comments=True))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with the configs, images and boxes that the READMEs' commands name."""
    home = tmp_path_factory.mktemp("reader")
    shutil.copytree(CONFIGS, home / "configs")
    random = np.random.default_rng(0)
    for name in [f"my_images/kind{kind}/{number}.jpg" for kind in range(5) for number in range(5)] + [
        *(f"holiday/{number}.jpg" for number in range(2)),
        *("cat.jpg", "dog.jpg", "digit.png"),
    ]:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
    film(home / "film.mp4", range(0, 200, 50))
    label_table(home / "my_images", home / "my_images")
    voc(home / "my_boxes")
    for kind, block in re.findall(
        r"```(?:python|yaml)\n# mynet\.(py|yaml)\n(.*?)```", TEXTS["visionattn/models/README.md"], re.S
    ):
        (home / f"mynet.{kind}").write_text(block)
    for picture in (home / "my_images").rglob("*.jpg"):
        heatmap = home / "their_maps" / picture.relative_to(home / "my_images").with_suffix(".npy")
        heatmap.parent.mkdir(parents=True, exist_ok=True)
        np.save(heatmap, random.random((60, 60)))
    (home / "names.txt").write_text("".join(f"kind{kind}\n" for kind in range(5)))
    return home


@pytest.fixture
def reader(home, monkeypatch):
    """Work in the folder `home`, without a network: smaller models with random weights replace the pretrained ones."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)  # as in a notebook, modules of the current folder can be imported
    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    create = timm.create_model

    def create_small(name, pretrained=False, **options):
        return create(SMALLER.get(name, name), **options)

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda name: clip(image_size=224))
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name: lambda texts, return_tensors: TOKENS
    )
    monkeypatch.setattr("visionattn.models.backbone.timm.create_model", create_small)
    return home


def fit(*arguments):
    assert main(["fit", *arguments, *SHORT]) == 0


def prepare(text):
    """Train the runs whose checkpoints the text names, unless they exist."""
    if "mynet.pth" in text and not Path("mynet.pth").exists():
        import mynet

        torch.save(mynet.make().state_dict(), "mynet.pth")
    if "runs/mynet/" in text and not Path("runs/mynet/0/best.ckpt").exists():
        fit("--config=mynet.yaml")
    for name, configs in {
        "quickstart": ["quickstart.yaml"],
        "vit-dense": ["vit/dense.yaml"],
        "bccd-dense": ["detection/bccd_dense.yaml"],
        "cluttered_60": ["glimpse/cluttered_60.yaml"],
        "detection-digits": ["detection/digits.yaml"],
    }.items():
        if f"runs/{name}/" in text and not Path(f"runs/{name}/0/best.ckpt").exists():
            config_text = "".join(Path("configs", config).read_text() for config in configs)
            flags_of_data = {"ImageFolderData": FOLDER, "AnnotatedData": BOXES}
            root = [flag for data, flags in flags_of_data.items() if data in config_text for flag in flags]
            fit(*(f"--config=configs/{config}" for config in configs), *root)


@pytest.mark.parametrize(("page", "command"), list(dict.fromkeys(commands())))
def test_command_of_a_readme_runs(page, command, reader, capfd):
    elsewhere = [tests for part, tests in ELSEWHERE.items() if part in command]
    if elsewhere:
        for path in re.findall(r"[\w./]+\.py", elsewhere[0]):
            test = CONFIGS.parent / ("tests/" + path if "/" not in path else path)
            assert test.exists(), elsewhere[0]
        return
    prepare(command)
    verb, *words = shlex.split(command)[1:]
    before = set(reader.rglob("*"))
    if verb in ("fit", "test", "predict", "validate"):
        text = "".join(Path(name).read_text() for name in re.findall(r"--config (\S+)", command))
        words += [
            flag for flag in SHORT if verb == "fit" or not flag.startswith(("--trainer.max", "--trainer.limit_t"))
        ]
        words += FOLDER if "ImageFolderData" in text else []
        words += ["--test_after_fit=false"] if "TableData" in text else []
        words += BOXES if "AnnotatedData" in text and verb == "fit" else []
        words += SMALL[2:] if "quickstart" in command else []
    if "--model" in words and "--weights" not in words:
        words += ["--weights", "random"]
    if verb == "score":
        words += ["--images", "4", "--steps", "2"]
    assert main([verb, *words]) == 0, capfd.readouterr().err
    new_files = set(reader.rglob("*")) - before
    printed = capfd.readouterr().out
    assert new_files or printed
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).exists()


@pytest.mark.filterwarnings("ignore:.*show nothing")  # with random weights, a map may be zero
@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_code_of_a_readme_runs(page, reader):
    """Run all blocks of a page in one namespace, as in a notebook; saved files must exist."""
    prepare("runs/cluttered_60/ runs/detection-digits/ runs/quickstart/")
    names, text = {}, TEXTS[page]
    for large, small_one in SMALLER_IMAGES.items():
        text = text.replace(large, small_one)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    code = re.sub(r"#.*", "", "\n".join(blocks))
    for file in re.findall(r'write_\w+\("([\w.]+)"|\.save\("([\w.]+)"\)', code):
        assert Path("".join(file)).exists()


def test_recipes_have_at_most_six_lines():
    blocks = [
        block
        for text in TEXTS.values()
        for section in re.findall(r"^## Recipes\n(.*?)(?=^## |\Z)", text, re.S | re.M)
        for block in re.findall(r"```python\n(.*?)```", section, re.S)
    ]
    assert len(blocks) >= 7
    assert [block for block in blocks if len(block.splitlines()) > 6] == []


def anchors(text):
    """Return the anchors of a page's headings on GitHub."""
    return {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.split("\n")
        if line[:1] == "#"
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files_and_headings(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors((target / "README.md" if target.is_dir() else target).read_text()), link
    assert not re.findall(r"\]\[(?!cli\])", re.sub(r"```.*?```", "", TEXTS[page], flags=re.S))


def rows(page, heading):
    """Yield the cells of each row of the first table after the heading."""
    lines = TEXTS[page].split(heading, 1)[1].split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_table_of_methods_matches_the_code():
    table = [row[:3] for row in rows("visionattn/maps/README.md", "## Methods")]
    assert table == [[name, method.needs, method.cost] for name, method in METHODS.items()]


def test_table_of_outputs_matches_the_code():
    table = list(rows("visionattn/overlays/README.md", "`--save` takes these kinds"))
    assert table == [[name, kind.help] for name, kind in OUTPUTS.items()]


def test_table_of_verbs_names_every_verb_and_its_module():
    modules = {}
    for verbs, _, files in rows("visionattn/commands/README.md", "visionattn --help"):
        for verb in re.findall(r"[\w-]+", verbs.replace("data check", "data")):
            modules[verb] = files.split(".py")[0]
    assert modules == {verb: module.rpartition(".")[2] for verb, (module, _) in _VERBS.items()}


def test_messages_of_troubleshooting_are_in_the_code():
    files = [ast.parse(path.read_text()) for path in (ROOT / "visionattn").rglob("*.py")]
    texts = {node.value for tree in files for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    code = "\n".join(text for text in texts if isinstance(text, str))
    table = list(rows("visionattn/commands/README.md", "## Troubleshooting"))
    quoted = [message for _, messages, _ in table for message in re.split("`, `", messages)]
    assert len(quoted) >= len(table) >= 10
    assert [message for message in quoted if message not in code] == []


def linked_text(page, cell):
    """Return the text of the pages and notebooks that a cell of a table links to."""
    text = ""
    for link in re.findall(r"\]\(([^)#]+)", cell):
        file = (ROOT / page).parent / link
        cells = json.loads(file.read_text())["cells"] if file.suffix == ".ipynb" else []
        text += file.read_text() if not cells else ""
        text += "".join(str(output.get("text", "")) for part in cells for output in part.get("outputs", []))
    return text


def test_figures_of_which_method_are_those_of_the_linked_pages():
    page, figure = "visionattn/maps/README.md", r"(?<![\d.])\d*\.\d+"
    figures = 0
    for network, _, _, measured, _ in rows(page, "## Which method?"):
        known = {float(text) for text in re.findall(figure, linked_text(page, measured))}
        found = [float(text) for text in re.findall(figure, re.sub(r"\]\([^)]*\)", "", measured))]
        assert known.issuperset(found), (network, set(found) - known)
        figures += len(found)
    assert figures > 20


def test_defaults_of_which_method_are_those_of_the_code():
    swin = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
    networks = {
        "CNN": timm.create_model("test_resnet"),
        "CNN with gates": ConvNet(3, attention=CBAM, widths=[16, 32]),
        "ViT with a class token": timm.create_model("test_vit"),
        "ViT without a class token": timm.create_model("test_vit", class_token=False, global_pool="avg"),
        "windowed ViT": timm.create_model("swin_tiny_patch4_window7_224", **swin),
        "detector": small.dense(),
        "detector with deformable attention": small.query(),
        "glimpses": glimpses.network(channels=3),
    }
    found = {}
    for kinds, default, *_ in rows("visionattn/maps/README.md", "## Which method?"):
        found |= dict.fromkeys(kinds.split(", "), default.split("`")[0])
    images = {"windowed ViT": torch.rand(1, 3, 32, 32), "glimpses": torch.rand(1, 3, 12, 15)}
    assert found == {
        kind: (default_box_method if "detector" in kind else partial(default_method, images_BCHW=images.get(kind)))(
            network.eval()
        ).name
        for kind, network in networks.items()
    }


def test_root_readme_has_at_most_125_lines():
    assert len(TEXTS["README.md"].splitlines()) <= 125
