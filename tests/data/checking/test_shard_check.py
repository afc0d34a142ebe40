"""Test the check of shards: what is wrong in shards that the test has written."""

import io
import json
import tarfile

import pytest

from tests.commands.command_line import fails
from tests.data.annotated import picture
from visionattn.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures, whose bytes are in `folder.pictures`, and a current folder for shards."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def image(folder, number):
    picture(folder / "picture.png", number)
    return (folder / "picture.png").read_bytes()


def write(path, *samples):
    """Write a shard of (key, image or None, class or None)."""
    with tarfile.open(path, "w") as archive:
        for key, content, label in samples:
            for suffix, part in (("png", content), ("cls", label)):
                if part is not None:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))


def test_shards_without_problems_are_counted_by_split(folder, capsys):
    first, second, third, fourth = (image(folder, number) for number in range(4))
    write("train-000.tar", ("0", first, b"cat"), ("1", second, b"dog"))
    write("val-000.tar", ("0", third, b"dog"), ("1", fourth, b"cat\n"))
    for where in (".", "*.tar"):
        assert main(["data", "check", where]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "shards, 2 classes: cat, dog"
        assert [line.split() for line in printed[1:3]] == [
            f"{split} 2 images: cat 1, dog 1".split() for split in ("train", "val")
        ]
        assert printed[3] == "no problems"
    (folder / "names.txt").write_text("dog\ncat\neel\n")
    assert main(["data", "check", ".", "--classes", "names.txt"]) == 1
    assert "2 missing class" in capsys.readouterr().out


def test_every_problem_of_shards_is_named(folder, capsys):
    first, second, third = (image(folder, number) for number in range(3))
    write("train-0.tar", ("0", first, b"0"), ("1", second, b"1"), ("2", first, b"0"), ("3", first[:300], b"1"))
    write("train-1.tar", ("0", third, b"7"))
    write("train-2.tar", ("0", third, None))
    write("val-0.tar", ("0", second, b"1"))
    (folder / "val-1.tar").write_bytes((folder / "val-0.tar").read_bytes()[:700])
    (folder / "names.txt").write_text("cat\ndog\n")
    assert main(["data", "check", ".", "--classes", "names.txt"]) == 1
    printed = capsys.readouterr().out
    for part in (
        "train-2.tar: the sample of 0.png needs one image and a .cls, but has png",
        "val-1.tar is cut short",
        "train-0.tar/3.png: cut short",
        "train-1.tar/0.png: there is no class '7'.",
        "train-0.tar/2.png: has the same content as 0.png",
        "val-0.tar/0.png: in val, and as 1.png in train",
        "cat: in val",
        "7 problems",
    ):
        assert part in printed, part
    listed = [{"url": "val-0.tar", "nsamples": 2}]
    (folder / "index.json").write_text(json.dumps({"shardlist": listed}))
    assert main(["data", "check", "index.json"]) == 1
    assert "val-0.tar has 1 samples, and the index says 2" in capsys.readouterr().out


def test_wrong_calls_of_the_check_of_shards_are_errors(folder, capsys):
    write("a.tar", ("0", image(folder, 0), b"0"))
    check = ["data", "check"]
    fails([*check, "none-*.tar"], 1, "no file matches none-*.tar", capsys=capsys)
    fails([*check, "http://host/a.tar"], 2, "is an address", capsys=capsys)
    fails([*check, "a.tar", "--box-format=xyxy"], 2, "are for folders with boxes", capsys=capsys)
    (folder / "empty").mkdir()
    fails([*check, "empty", "--classes=x"], 2, "--classes is for shards, and empty is none", capsys=capsys)


def test_leaks_and_twins_of_splits_that_alternate_are_told_apart(folder, capsys):
    first, second = image(folder, 0), image(folder, 1)
    for name in ("a", "b"):
        (folder / name).mkdir()
    write("a/train-0.tar", ("0", first, b"cat"))
    write("a/val-0.tar", ("0", second, b"cat"))
    write("b/train-0.tar", ("0", first, b"cat"))
    assert main(["data", "check", "*/*.tar"]) == 1
    printed = capsys.readouterr().out
    assert "b/train-0.tar/0.png: has the same content as" in printed
    assert "in val, and as" not in printed


def test_an_archive_beside_folders_of_images_is_no_shard(folder, capsys):
    for place in ("train/cat/0", "train/dog/1"):
        picture(folder / f"{place}.png", int(place[-1]))
    write("photos.tar", ("0", None, b"cat"))
    assert main(["data", "check", "."]) == 0
    assert capsys.readouterr().out.startswith("folder, 2 classes: cat, dog")
