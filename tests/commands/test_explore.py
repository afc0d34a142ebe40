"""`visionattn explore` writes a page, and wrong calls end with an exit code."""

from PIL import Image

from tests.explorer.explored import photo
from visionattn.cli import main


def test_explore_writes_a_page_and_wrong_calls_are_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        Image.fromarray(photo(seed=number)).save(f"{number}.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    call = ["explore", "--images", ".", "--model", "test_vit", "--weights", "random", "--method", "raw", "--steps", "2"]
    assert main([*call, "--out", "seen.html", "--count", "3"]) == 0
    assert "seen.html" in (printed := capsys.readouterr().out)
    assert "3 images of 6, chosen at equal intervals" in printed
    assert main([*call, "--out", "seen.html"]) == 1  # an earlier page is overwritten; 1 because an image failed
    assert "bad.jpg" in capsys.readouterr().out
    (tmp_path / "mine.html").write_text("mine")
    assert main([*call, "--out", "mine.html"]) == 2
    assert "choose another name" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert main([*call, "--out", "x.html", "--steps", "1"]) == 2
    assert main([*call, "--out", "none/x.html"]) == 1
