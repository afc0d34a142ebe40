"""Completion scripts, run by the shells themselves."""

import shutil
import subprocess

import pytest

from visionattn.cli import main


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The files that `visionattn completion` prints."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(out.getvalue())
    return folder


def by_bash(scripts, *words):
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {scripts / 'bash'}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_visionattn"
    done = subprocess.run(
        ["bash", "-c", f'{code}; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def by_fish(scripts, *words):
    code = f"source {scripts / 'fish'}; complete -C '{' '.join(words)}'"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True)
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


ASK = {"bash": by_bash, "fish": by_fish}


@pytest.mark.parametrize("shell", [shell for shell in ASK if shutil.which(shell)])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["visionattn", "ex"], ["explore", "export"]),
        (["visionattn", "overlay", "--col"], ["--colormap"]),
        (["visionattn", "overlay", "--format", "p"], ["png"]),
        (["visionattn", "export", "--format", ""], ["safetensors", "onnx", "torch_export"]),
        (["visionattn", "overlay", "--images", "a.jpg", "--col"], ["--colormap"]),
        (["visionattn", "data", "check", "--box-format", "xy"], ["xyxy", "xywh"]),
        (["visionattn", "fit", "--trainer.max_e"], ["--trainer.max_epochs"]),
        (["visionattn", "fit", "--trainer.barebones", ""], ["true", "false"]),
    ],
)
def test_a_shell_completes(shell, words, expected, scripts):
    assert sorted(ASK[shell](scripts, *words)) == sorted(expected)


def test_the_script_of_zsh_is_valid(scripts):
    assert (scripts / "zsh").read_text().startswith("#compdef visionattn\n")
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n", scripts / "zsh"], check=True, capture_output=True)


def test_another_shell_is_refused(capsys):
    assert main(["completion", "bsh"]) == 2
    assert "no completion for 'bsh'; there is for bash, zsh, fish. Nearest: bash" in capsys.readouterr().err
