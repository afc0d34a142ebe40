"""A process that has imported everything, and forks a child for each command line: kills cost a second, not ten.

Reads a JSON object a line: {"argv", "cwd", "env", "fault", "out"} starts a child and answers its pid; {"wait",
"seconds"} answers the child's wait status, or null while it runs. `fault` is Python that the child runs first.
"""

import json
import os
import signal
import sys
import time


def child(request: dict) -> None:
    os.setpgid(0, 0)
    handle = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    import tempfile

    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["visionattn", *request["argv"]]
    code = 70
    try:
        exec(request["fault"], {})
        from visionattn.cli import main

        code = main(request["argv"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import albumentations  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection
    import timm  # noqa: F401
    import torch

    import visionattn.commands.scorecard
    import visionattn.models
    import visionattn.overlays.folder.export
    import visionattn.tasks
    import visionattn.training.command  # noqa: F401

    torch.set_num_threads(1)
    sklearn.datasets.load_digits()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            end = time.monotonic() + request["seconds"]
            status = None
            while status is None:
                pid, found = os.waitpid(request["wait"], os.WNOHANG)
                status = found if pid else None
                if status is None and time.monotonic() > end:
                    break
                time.sleep(0.005)
            print(json.dumps(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(request)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
