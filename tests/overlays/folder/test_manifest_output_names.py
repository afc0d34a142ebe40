"""Names of outputs are unique and valid on every common file system."""

import os

from visionattn.overlays.folder.manifest import output_names

NOT_TEXT = os.fsdecode(b"caf\xe9.jpg")  # Latin-1, not valid UTF-8


def name_all(images, root, *, ending=".overlay.jpg", taken=(), kept=()):
    return output_names([os.path.join(root, image) for image in images], root, ending, dict(taken), dict(kept))


def test_outputs_mirror_the_paths_of_their_images(tmp_path):
    images = ["x.jpg", "a/x.jpg", "a/x.png", f"a/{NOT_TEXT}", "a/b c/ảnh 犬.webp", "a/new\nline.jpg"]
    names = name_all(images, "/in", ending=".overlay.webp")
    assert list(names.values()) == [f"{image}.overlay.webp" for image in images]


def test_names_that_some_file_system_treats_as_equal_get_different_names():
    images = ["a/x.jpg", "a/X.jpg", "A/x.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg", "straße.jpg", "STRASSE.jpg"]
    names = list(name_all(images, "/in").values())
    assert names[0] == "a/x.jpg.overlay.jpg"
    assert len({name.casefold().replace("e\u0301", "\u00e9").replace("ß", "ss") for name in names}) == len(images)


def test_names_of_more_than_255_bytes_are_shortened_between_letters(tmp_path):
    images = ["a" * 251 + ".jpg", "犬" * 83 + "xx.jpg", "犬" * 83 + "xy.jpg", os.fsdecode(b"\xe9" * 251 + b".jpg")]
    names = name_all(images, str(tmp_path))
    assert len(set(names.values())) == 4
    for name in names.values():
        assert len(os.fsencode(name)) <= 255
        (tmp_path / name).touch()
        assert name.endswith(".overlay.jpg")
    list(names.values())[1].encode()  # fails if a letter was cut in two


def test_images_keep_their_output_names_in_later_runs():
    first = name_all(["a.jpg", "A.jpg"], "/in")
    taken = {name: image for image, name in first.items()}
    again = name_all(["A.jpg", "a.jpg", "b.jpg"], "/in", taken=taken, kept=first)
    assert {image: again[image] for image in first} == first
    elsewhere = name_all(["a.jpg"], "/other", taken=taken, kept=first)  # an image of the same name below another root
    assert set(elsewhere.values()).isdisjoint(taken)
    kept = {"/in/deep/x.jpg": "deep/x.jpg.overlay.jpg"}  # from a run over /in; the next run is only over /in/deep
    assert name_all(["x.jpg"], "/in/deep", taken={"deep/x.jpg.overlay.jpg": "/in/deep/x.jpg"}, kept=kept) == kept
    other_format = name_all(["a.jpg"], "/in", ending=".overlay.png", taken=taken, kept=first)
    assert other_format == {"/in/a.jpg": "a.jpg.overlay.png"}
