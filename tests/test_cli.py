"""The command line starts quickly and has help for every verb."""

import subprocess
import sys
import time

import pytest

from visionattn.cli import main


def run_python(code, folder):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_help_is_quick_and_imports_no_torch(tmp_path):
    code = "import sys; from visionattn.cli import main; main(['--help']); print({'torch', 'numpy'} & set(sys.modules))"
    started = time.perf_counter()
    result = run_python(code, tmp_path)
    assert time.perf_counter() - started < 1
    assert result.stdout.splitlines()[-1] == "set()"
    for verb in ("fit", "validate", "test", "predict", "data", "overlay", "score", "export"):
        assert f"  {verb} " in result.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    heavy = "{'torch', 'numpy', 'cv2', 'lightning', 'timm', 'albumentations'}"
    result = run_python(f"import sys, visionattn, visionattn.data; print({heavy} & set(sys.modules))", tmp_path)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("verb", ["fit", "data", "overlay", "score"])
def test_help_of_a_verb_exits_with_0(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_verb_that_cannot_share_its_work_refuses_several_processes(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "4")
    assert main(["score", "--model", "test_vit", "--data", "photos"]) == 2
    assert f"score runs in one process, and {variable} says that 4 were started" in capsys.readouterr().err
    monkeypatch.setenv(variable, "1")
    assert main(["data", "check", "photos"]) == 1
    assert "there is no" in capsys.readouterr().err  # folder photos
