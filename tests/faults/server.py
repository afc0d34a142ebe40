"""A process that has imported everything, and forks a child for each command line.

A forked child starts in about a second, a new process in about ten. The server reads requests from stdin and writes
answers to stdout, one JSON value per line:

- {"argv", "cwd", "env", "fault", "out"} starts a child, which first runs the Python code `fault`. Answer: its pid.
- {"wait": pid, "seconds"} waits for a child. Answer: its wait status, or null if it still runs after the time.
"""

import json
import os
import signal
import sys
import time


def child(request: dict) -> None:
    """Run the command line of a request, then exit."""
    os.setpgid(0, 0)  # a process group of its own, so that its worker processes can be killed with it
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
