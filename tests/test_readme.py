"""READMEs: commands and code run from top to bottom in one folder, links lead to files, and tables match the code."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torchvision
from PIL import Image

from tests.commands.command_line import FakeMNIST
from tests.conftest import CONFIGS, SMALL
from tests.data.annotated import voc
from visionattn.cli import _VERBS, main
from visionattn.maps import METHODS
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
    "mynet": "tests/commands/test_options_own_network.py trains and explains such a network",
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
SMALLER = {"vit_small_patch16_224": "test_vit", "resnet50": "test_resnet"}


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
    voc(home / "my_boxes")
    return home


@pytest.fixture
def reader(home, monkeypatch):
    """Work in the folder `home`, without a network: smaller models with random weights replace the pretrained ones."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    create = timm.create_model

    def create_small(name, pretrained=False, **options):
        return create(SMALLER.get(name, name), **options)

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.setattr("visionattn.models.backbone.timm.create_model", create_small)
    return home


def fit(*arguments):
    assert main(["fit", *arguments, *SHORT]) == 0


def prepare(text):
    """Train the runs whose checkpoints the text names, unless they exist."""
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
        words += BOXES if "AnnotatedData" in text and verb == "fit" else []
        words += SMALL[2:] if "quickstart" in command else []
    if "--model" in words:
        words += ["--weights", "random"]
    if verb == "score":
        words += ["--images", "4", "--steps", "2"]
    assert main([verb, *words]) == 0, capfd.readouterr().err
    new_files = set(reader.rglob("*")) - before
    printed = capfd.readouterr().out
    assert new_files or printed
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).exists()


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_code_of_a_readme_runs(page, reader):
    """Run all blocks of a page in one namespace, as in a notebook; saved files must exist."""
    prepare("runs/cluttered_60/ runs/detection-digits/ runs/quickstart/")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.S):
        exec(compile(block, page, "exec"), names)
    code = re.sub(r"#.*", "", "\n".join(re.findall(r"```python\n(.*?)```", TEXTS[page], re.S)))
    for file in re.findall(r'write_\w+\("([\w.]+)"|\.save\("([\w.]+)"\)', code):
        assert Path("".join(file)).exists()


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


def test_root_readme_has_at_most_125_lines():
    assert len(TEXTS["README.md"].splitlines()) <= 125
