"""Batches come as mappings, data frames and tables; pictures as paths, URLs or content."""

import http.server
import threading
from functools import partial

import numpy as np
import pandas
import pyarrow as pa
import pytest

from tests.batches.pictures import write_pictures
from visionattn.batches.pictures import read_rows
from visionattn.data import read_image


@pytest.fixture
def paths(tmp_path):
    return [str(path) for path in write_pictures(tmp_path, 2)]


@pytest.fixture
def server(tmp_path):
    """Serve the folder over http; return the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *message):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def read(columns):
    return read_rows(columns, max_pixels=10_000)


def content(path):
    with open(path, "rb") as file:
        return file.read()


def test_every_kind_of_batch_is_read(paths):
    for make in (dict, pa.table, pandas.DataFrame, lambda x: {name: np.array(column) for name, column in x.items()}):
        for row, path in zip(read(make({"path": paths, "number": [1, 2]})), paths, strict=True):
            np.testing.assert_array_equal(row.picture, read_image(path))
    for make in (dict, pa.table, pandas.DataFrame):
        rows = read(make({"bytes": [content(path) for path in paths], "path": ["a", "/etc/passwd"]}))
        assert [row.path for row in rows] == ["a", "/etc/passwd"]
        for row, path in zip(rows, paths, strict=True):
            np.testing.assert_array_equal(row.picture, read_image(path))


def test_urls_are_fetched(paths, server):
    rows = read({"path": [f"{server}/0.png", f"{server}/nothing.png", f"file://{paths[1]}", "strange://x/y.png"]})
    np.testing.assert_array_equal(rows[0].picture, read_image(paths[0]))
    np.testing.assert_array_equal(rows[2].picture, read_image(paths[1]))
    assert "nothing.png cannot be fetched" in rows[1].error
    assert rows[3].error.startswith("strange://x/y.png cannot be fetched")


def test_errors_name_the_image_and_the_reason(paths):
    rows = read({"path": ["a.png", None, "c.png"], "bytes": [b"", None, content(paths[0])[:99]]})
    assert [row.error.split(":")[0].split(" is ")[0] for row in rows] == ["a.png", "the image", "c.png"]
    assert "is empty" in rows[0].error
    assert "there is no file content" in rows[1].error
    rows = read(
        {"path": [float("nan"), 5, content(paths[0]), "a\0.png", paths[0]], "target": [None, None, "1", 2.0, None]}
    )
    assert all(row.error.startswith("there is no file name in the column `path`") for row in rows[:3])
    assert "null" in rows[3].error
    assert [row.target for row in rows] == [None, None, "1", 2, None]
    assert (
        read({"path": paths[:1], "target": [1.5]})[0].error
        == "the target 1.5 is neither the index nor the name of a class"
    )
    assert rows[4].picture is not None
    (row,) = read({"path": ["/tmp/\udcff\n.png"]})
    assert row.path == "/tmp/��.png"
    row.path.encode()
    assert read_rows({"path": paths[:1]}, max_pixels=10)[0].error.endswith("(--max-pixels)")
