"""Test that warnings of libraries are silenced and that all other warnings are shown."""

import errno
import logging
import threading
import warnings

import pytest
from torch.utils.tensorboard import SummaryWriter

from visionattn.training.third_party_warnings import silence_third_party_warnings

LOGGERS = ("lightning.pytorch", "lightning.fabric", "matplotlib.font_manager")


@pytest.fixture
def restored_logging():
    """Restore the warning filters and the log levels after a test."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_warnings_of_libraries_are_silenced_and_other_warnings_are_shown():
    silence_third_party_warnings()
    with warnings.catch_warnings(record=True) as shown:
        for module in ("timm.layers", "torch", "lightning.pytorch.trainer", "visionattn.maps.method", "__main__"):
            warnings.warn_explicit("careful", UserWarning, f"{module}.py", 1, module=module)
    assert [warning.filename for warning in shown] == ["visionattn.maps.method.py", "__main__.py"]


@pytest.mark.usefixtures("restored_logging")
def test_lightning_logs_warnings_but_no_information():
    silence_third_party_warnings()
    for name in LOGGERS[:2]:
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)


class FullDisk:
    """A file that cannot be written."""

    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("restored_logging")
def test_thread_of_tensorboard_reports_no_full_disk_but_the_main_thread_does(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    silence_third_party_warnings()
    writer = SummaryWriter(tmp_path)
    worker = writer.file_writer.event_writer._async_writer._worker
    monkeypatch.setattr(worker, "_record_writer", FullDisk())
    writer.add_scalar("loss", 1.0)
    worker.join()
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    assert reported == []
    own = threading.Thread(target=FullDisk().write, args=(b"",))
    own.start()
    own.join()
    assert [type(args.exc_value) for args in reported] == [OSError]
