"""Completion scripts, run in real shells."""

import shutil
import subprocess

import pytest

from visionattn.cli import main


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Return a folder with the completion script of each shell."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(out.getvalue())
    return folder


def complete_in_bash(scripts, *words):
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {scripts / 'bash'}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_visionattn"
    process = subprocess.run(
        ["bash", "-c", f'{code}; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    return process.stdout.split()


def complete_in_fish(scripts, *words):
    code = f"source {scripts / 'fish'}; complete -C '{' '.join(words)}'"
    process = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True)
    return [line.split("\t")[0] for line in process.stdout.splitlines()]


COMPLETE = {"bash": complete_in_bash, "fish": complete_in_fish}


@pytest.mark.parametrize("shell", [shell for shell in COMPLETE if shutil.which(shell)])
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
def test_shell_completes_verbs_options_and_values(shell, words, expected, scripts):
    assert sorted(COMPLETE[shell](scripts, *words)) == sorted(expected)


def test_zsh_script_is_valid(scripts):
    assert (scripts / "zsh").read_text().startswith("#compdef visionattn\n")
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n", scripts / "zsh"], check=True, capture_output=True)


def test_unknown_shell_is_an_error(capsys):
    assert main(["completion", "bsh"]) == 2
    assert "no completion script for 'bsh'; choose one of bash, zsh, fish. Nearest: bash" in capsys.readouterr().err
