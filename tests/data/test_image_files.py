"""Test the search for images, against `os.walk` and against expected lists."""

import os
from pathlib import Path

import pytest

from tests.refusals import refuses
from visionattn.data.decode import SUFFIXES, read_image
from visionattn.data.image_files import find, sample_photographs
from visionattn.errors import DataError, UsageError

NOT_TEXT = os.fsdecode(b"caf\xe9.jpg")


def touch(root, *names):
    """Create empty files and their folders below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def below(found, root):
    """Return the found images as paths relative to `root`."""
    return [os.path.relpath(image, root) for image in found.images]


def test_folders_are_searched_recursively_in_natural_order(tmp_path):
    names = ["img2.jpg", "img10.JPG", "b/1/x.webp", "b/2.tiff", "b/10.png", "a10/z.gif", "a9/z.bmp", "Z.jpeg"]
    touch(tmp_path, *names)
    expected = ["Z.jpeg", "img2.jpg", "img10.JPG", "a9/z.bmp", "a10/z.gif", "b/2.tiff", "b/10.png", "b/1/x.webp"]
    assert below(find([tmp_path], out=tmp_path / "out"), tmp_path) == expected


def test_find_matches_os_walk(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 300)
    os.makedirs(deep)
    touch(
        tmp_path, "d/x.jpg", *(f"{suffix[1:]}/x{change(suffix)}" for suffix in SUFFIXES for change in (str, str.upper))
    )
    (deep / "bottom.png").touch()
    walked = [os.path.join(here, file) for here, _, files in os.walk(tmp_path) for file in files]
    assert len(walked) == 2 + 2 * len(SUFFIXES)
    assert sorted(find([tmp_path], out=tmp_path / "out").images) == sorted(walked)


def test_hidden_linked_and_other_files_are_skipped_and_counted(tmp_path):
    root = touch(tmp_path / "in", "a.jpg", ".hidden.jpg", ".git/b.jpg", "notes.txt", "b.TXT", "c/readme", "c/x.csv")
    elsewhere = touch(tmp_path / "elsewhere", "c.jpg")
    (root / "link").symlink_to(elsewhere)
    (root / "up").symlink_to(root)
    (root / "linked.jpg").symlink_to(elsewhere / "c.jpg")
    found = find([root], out=tmp_path / "out")
    assert below(found, root) == ["a.jpg", "linked.jpg"]
    assert found.links == 2
    assert found.ignored == {".txt": 2, "": 1, ".csv": 1}


def test_broken_links_count_as_images_and_pipes_do_not(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "to_pipe.jpg").symlink_to(tmp_path / "pipe.jpg")
    found = find([tmp_path], out=tmp_path / "out")
    assert below(found, tmp_path) == ["a.jpg", "broken.jpg", "loop.jpg"]
    assert found.ignored == {".jpg": 2, "": 1}
    refuses(UsageError, "neither a file nor a folder", lambda: find([tmp_path / "pipe.jpg"], out=tmp_path / "out"))


def test_files_keep_their_order_without_duplicates(tmp_path):
    touch(tmp_path, "b.jpg", "a.jpg", ".hidden.png", "photo")
    given = [tmp_path / name for name in ("b.jpg", "photo", ".hidden.png", "a.jpg", "b.jpg")]
    assert below(find([*given, tmp_path], out="out"), tmp_path) == ["b.jpg", "photo", ".hidden.png", "a.jpg"]


@pytest.mark.parametrize("convert", [str, os.fsencode, lambda path: path], ids=["str", "bytes", "Path"])
def test_single_path_of_any_type_is_accepted(tmp_path, convert, monkeypatch):
    touch(tmp_path, NOT_TEXT)
    assert find(convert(tmp_path), out="out").images == [os.path.join(tmp_path, NOT_TEXT)]
    monkeypatch.chdir(tmp_path)
    assert find(os.fsencode(NOT_TEXT), out="out").images == [os.path.join(tmp_path, NOT_TEXT)]


def test_root_is_the_common_folder_of_the_inputs(tmp_path):
    touch(tmp_path, "a/x/1.jpg", "a/y/2.jpg", "a/3.jpg")
    assert find([tmp_path / "a/x"], out="out").root == str(tmp_path / "a/x")
    assert find([tmp_path / "a/x/1.jpg"], out="out").root == str(tmp_path / "a/x")
    assert find([tmp_path / "a/x", tmp_path / "a/y/2.jpg"], out="out").root == str(tmp_path / "a")


@pytest.mark.parametrize("out", ["in/out", "in", "link/out", "link"])
@pytest.mark.parametrize("given", ["in", "link"])
def test_earlier_outputs_are_not_read(tmp_path, out, given):
    root = touch(tmp_path / "in", "a.jpg", "b/c.png")
    (tmp_path / "link").symlink_to(root)
    folder = tmp_path / out
    outputs = [folder / "a.jpg.overlay.jpg", folder / "b" / "c.png.overlay.jpg"]
    touch(tmp_path, *(str(output.relative_to(tmp_path)) for output in outputs))
    found = find([tmp_path / given], out=folder, written={str(output) for output in outputs})
    assert below(found, tmp_path / given) == ["a.jpg", "b/c.png"]
    assert not found.ignored


def test_input_folder_inside_the_output_folder_is_searched(tmp_path):
    touch(tmp_path, "in/a.jpg")
    assert below(find([tmp_path / "in"], out=tmp_path), tmp_path) == ["in/a.jpg"]


def test_unlistable_folder_is_reported_and_others_are_read(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.jpg", "locked/y.jpg", "z/z.jpg")
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find([tmp_path], out="out")
    assert below(found, tmp_path) == ["a/x.jpg", "z/z.jpg"]
    assert found.unlisted == [(str(tmp_path / "locked"), "cannot be listed: Permission denied")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("holidya", r"there is no .*holidya\. Nearest: holiday\."),
        ("holiday/IMG_1.jpeg", r"there is no .*IMG_1\.jpeg\. Nearest: IMG_1\.jpg"),
        ("holidya/deeper/still", r"there is no .*/holidya\. Nearest: holiday\."),
        ("qqqqqq", r"there is no .*qqqqqq\.$"),
    ],
)
def test_missing_path_raises_with_similar_names(tmp_path, given, message):
    touch(tmp_path, "holiday/IMG_1.jpg")
    with pytest.raises(UsageError, match=message) as raised:
        find([tmp_path / given], out="out")
    assert "\n" not in str(raised.value)


def test_inputs_without_an_image_raise_with_counts_of_other_files(tmp_path):
    touch(tmp_path, "a.txt", "b.txt", "c", ".d.jpg")
    refuses(DataError, r"no image in .*, only 2 \.txt, 1 without suffix$", find, [tmp_path], out="out")
    (tmp_path / "empty").mkdir()
    refuses(DataError, "hidden files do not count", lambda: find([tmp_path / "empty"], out="out"))
    refuses(UsageError, "there are no inputs", find, [], out="out")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["img2.jpg", "img10.jpg"]),
        ("**/*.jpg", ["img2.jpg", "img10.jpg", "b/c.jpg", "b/d/e.jpg"]),
        (
            "b/*",
            ["b/c.jpg", "b/film.mp4"],
        ),  # the pattern also matches the folder b/d and b/notes.txt, which are skipped
        ("?/?.*", ["b/c.jpg"]),
        ("b/[cx].jpg", ["b/c.jpg"]),
    ],
)
def test_patterns_match_images_and_videos(tmp_path, pattern, expected):
    touch(tmp_path, "img10.jpg", "img2.jpg", "b/c.jpg", "b/d/e.jpg", "b/notes.txt", "b/film.mp4", ".hidden/x.jpg")
    found = find([tmp_path / pattern], out=tmp_path / "out")
    assert sorted(below(found, tmp_path)) == sorted(expected)
    assert found.root == str(tmp_path / os.path.dirname(pattern) if pattern.startswith("b/") else tmp_path)


def test_pattern_skips_earlier_outputs_and_name_of_an_existing_file_is_no_pattern(tmp_path):
    touch(tmp_path, "a.jpg", "[x]*.jpg", "out/a.jpg.overlay.jpg")
    assert below(find([tmp_path / "[x]*.jpg"], out="out"), tmp_path) == ["[x]*.jpg"]
    assert set(below(find([tmp_path / "**" / "*.jpg"], out=tmp_path / "out"), tmp_path)) == {"a.jpg", "[x]*.jpg"}
    written = {str(tmp_path / "out" / "a.jpg.overlay.jpg")}
    assert len(find([tmp_path / "**" / "*.jpg"], out=tmp_path, written=written).images) == 2  # out contains the inputs
    refuses(UsageError, r"nothing matches .*\*\.jpeg; quote a pattern", lambda: find([tmp_path / "*.jpeg"], out="out"))


def test_video_is_found_only_if_its_path_is_given(tmp_path):
    touch(tmp_path, "a.jpg", "film.MP4")
    assert below(find([tmp_path], out="out"), tmp_path) == ["a.jpg"]
    assert below(find([tmp_path / "film.MP4"], out="out"), tmp_path) == ["film.MP4"]


def test_two_targets_for_one_image_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("path,target\na.jpg,cat\nb.jpg,dog\na.jpg,cat\na.jpg,dog\n")
    with pytest.raises(DataError, match=r"list\.csv: \S+a\.jpg is listed with the targets cat and dog"):
        find([tmp_path / "list.csv"], out=tmp_path / "out")


def test_sample_photographs_exist_and_have_sources():
    paths = [Path(path) for path in sample_photographs()]
    assert [path.name for path in paths] == ["chelsea.jpg", "coffee.jpg", "china.jpg", "flower.jpg"]
    assert [read_image(path).shape for path in paths] == [(300, 451, 3), (400, 600, 3), (427, 640, 3), (427, 640, 3)]
    sources = (paths[0].parent / "SOURCES.md").read_text()
    assert all(f"`{path.name}`" in sources for path in paths)
    assert sum(path.stat().st_size for path in paths[:2]) < 300_000
