"""Test lists of images: how each kind of line is read, and the errors of invalid lines."""

import json
import os

import pytest

from tests.refusals import refuses
from visionattn.data.image_files import find
from visionattn.data.image_list import ImageRequest, read_list
from visionattn.errors import DataError, UsageError

NOT_TEXT = b"caf\xe9.jpg"


def listed(tmp_path, name, content):
    """Write a list, read it, and return (relative path, request) of each image."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(os.path.relpath(image, tmp_path), request) for image, request in read_list(str(path))]


def test_csv_without_header_has_one_path_per_line(tmp_path):
    content = b"a.jpg\n\nb/c.png,ignored\n../up.jpg\n/abs.jpg\n" + NOT_TEXT + b"\n"
    assert listed(tmp_path, "x.csv", content) == [
        ("a.jpg", None),
        ("b/c.png", None),
        ("../up.jpg", None),
        (os.path.relpath("/abs.jpg", tmp_path), None),
        (os.fsdecode(NOT_TEXT), None),
    ]


def test_csv_with_a_header_gives_targets_and_boxes(tmp_path):
    content = '\ufeffLabel,path,target,x0,y0,x1,y1\ncat,"a, b.jpg",3,1,2,3.5,4\n,c.jpg,tabby cat,,,,\n,d.jpg\n'
    assert listed(tmp_path, "x.csv", content) == [
        ("a, b.jpg", ImageRequest("3", ((1.0, 2.0, 3.5, 4.0),), ("cat",))),
        ("c.jpg", ImageRequest("tabby cat")),
        ("d.jpg", None),
    ]


def test_jsonl_lines_are_paths_or_objects_or_lines_of_a_manifest(tmp_path):
    lines = [
        "a.jpg",
        {"path": "b.jpg", "target": 0, "boxes": [[0, 1, 2, 3], [4, 5, 6, 7]], "labels": ["x", "y"]},
        {"source": "/in/c.jpg", "target": 7, "status": "done"},  # a line of a manifest, whose target is not used
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines) + "\n"
    assert listed(tmp_path, "x.jsonl", content) == [
        ("a.jpg", None),
        ("b.jpg", ImageRequest(0, ((0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0)), ("x", "y"))),
        (os.path.relpath("/in/c.jpg", tmp_path), None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '"a.jpg"\n{"path": 3}\n', r"x\.jsonl, line 2: there is no path"),
        ("x.jsonl", '{"path": "a"', r"cannot be read as a list of images"),
        ("x.jsonl", '{"path": "a", "boxes": [[1, 2, 3]]}', r"line 1: a box must be x0, y0, x1, y1"),
        ("x.jsonl", '{"path": "a", "boxes": [[1, 2, 3, 4]], "labels": ["a", "b"]}', "one label per box"),
        ("x.jsonl", '{"path": "a", "target": 1.5}', "target must be a number or a class name, got 1.5"),
        ("x.csv", "path,x0,y0\na.jpg,1,2\n", "line 2: there is no x1"),
        ("x.csv", "path,x0,y0,x1,y1\na.jpg,1,2,3,wide\n", "line 2: could not convert"),
        ("x.csv", "path,target\n,3\n", "line 2: there is no path"),
    ],
)
def test_invalid_line_raises_with_its_number(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as raised:
        listed(tmp_path, name, content)
    assert "\n" not in str(raised.value)


def test_lists_mix_with_other_inputs_and_lines_of_one_image_merge(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "x.csv").write_text("path,x0,y0,x1,y1,label\nb.jpg,0,0,1,1,one\na.jpg\nb.jpg,2,2,3,3,two\n")
    found = find([tmp_path / "x.csv", tmp_path / "a.jpg"], out="out")
    assert found.images == [str(tmp_path / "b.jpg"), str(tmp_path / "a.jpg")]  # missing b.jpg fails only when read
    assert found.requests == {str(tmp_path / "b.jpg"): ImageRequest(None, ((0, 0, 1, 1), (2, 2, 3, 3)), ("one", "two"))}
    assert found.root == str(tmp_path)
    (tmp_path / "empty.csv").touch()
    refuses(DataError, "there is no image in", lambda: find([tmp_path / "empty.csv"], out="out"))
    refuses(UsageError, r"there is no .*nothing\.csv", lambda: find([tmp_path / "nothing.csv"], out="out"))
