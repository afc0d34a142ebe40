"""Test shards: samples match webdataset, the cache is limited, invalid shards raise."""

import contextlib
import http.server
import io
import json
import shutil
import tarfile
import threading

import numpy as np
import pytest
from webdataset import WebDataset

from tests.data.shards_written import NAMES, write_shards
from tests.refusals import refuses
from visionattn.data.decode import read_image
from visionattn.data.loading.order import Order
from visionattn.data.placement import Preprocess
from visionattn.data.shards import ShardData, Shards, Store, find_shards
from visionattn.errors import DataError, UsageError

SMALL = Preprocess((40, 48))


@pytest.fixture(scope="module")
def shards(photo_folder, tmp_path_factory):
    """Return a folder of six shards with ten samples each, and path of a sample → (source file, label)."""
    folder = tmp_path_factory.mktemp("shards") / "some"
    return folder, write_shards(photo_folder, folder)


def dataset(where, store=None, **options):
    return Shards(find_shards(str(where)), NAMES, preprocess=SMALL, store=store or Store("", 0), **options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does not close its files
def test_samples_match_webdataset(shards):
    folder, truth = shards
    ours = dataset(folder / "train-*.tar")
    theirs = list(WebDataset([url for url, _ in ours.shards], shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert len(ours) == len(theirs) == 60
    for index, (picture, label) in enumerate(theirs):
        sample = ours[index]
        np.testing.assert_array_equal(sample["image"].numpy(), SMALL(picture)[0])
        assert sample["label"] == label
        path, expected = truth[sample["path"]]
        assert expected == label
        np.testing.assert_array_equal(ours.read_source(sample["path"]), read_image(path))


def test_epoch_has_every_sample_once_from_few_shards_at_a_time(shards):
    samples = dataset(shards[0] / "train.json", mixed=2)
    order, other_order = samples.shuffled(1), samples.shuffled(2)
    assert sorted(order) == sorted(other_order) == list(range(60))
    assert order != other_order
    assert order == samples.shuffled(1)
    for start in range(0, 60, 20):  # each group of 20 samples comes from two shards of 10 samples
        assert len({index // 10 for index in order[start : start + 20]}) == 2
        assert order[start : start + 20] != sorted(order[start : start + 20])
    by_rank = [list(Order(samples, seed=3, rank=rank, world_size=2, shuffled=samples.shuffled)) for rank in range(2)]
    of_single = list(Order(samples, seed=3, shuffled=samples.shuffled))
    assert [key for keys in zip(*by_rank, strict=True) for key in keys] == of_single
    assert [index for index, _ in of_single] != list(Order(samples, seed=3))


@pytest.fixture
def served(shards):
    """Serve the folder of shards by HTTP; yield the URL and the list of requested paths."""
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(shards[0]))

        def do_GET(self):
            requested.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        yield address, requested


@contextlib.contextmanager
def serving(handler):
    """Serve HTTP on this machine while the context is open; yield the URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_remote_shards_are_fetched_once_per_epoch_into_a_limited_cache(served, shards, tmp_path):
    address, requested = served
    size = (shards[0] / "train-000.tar").stat().st_size
    store = Store(str(tmp_path / "cache"), 3 * size)
    remote, local = dataset(f"{address}/train.json", store, mixed=2), dataset(shards[0] / "train.json")
    for index in remote.shuffled(0):
        np.testing.assert_array_equal(remote[index]["image"], local[index]["image"])
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 3 * size
    assert sorted(name for name in requested if name.endswith(".tar")) == [f"/train-{n:03}.tar" for n in range(6)]
    assert not list((tmp_path / "cache").glob(".part.*"))
    refuses(DataError, r"train-9\.tar cannot be fetched", lambda: store.open(f"{address}/train-9.tar", 1))


def test_download_that_is_cut_short_is_not_kept(shards, tmp_path):
    """A server that does not tell the length of a file can cut it short without an error, here between two samples."""
    whole = (shards[0] / "train-000.tar").read_bytes()
    with tarfile.open(shards[0] / "train-000.tar") as archive:
        third = archive.getmembers()[6].offset
    answers = []  # the server sends the last one

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()  # without Content-Length
            self.wfile.write(answers[-1])

        def log_message(self, *_):
            pass

    store = Store(str(tmp_path / "cache"), 10**9)
    with serving(Handler) as address:
        samples = Shards([(f"{address}/a.tar", 10)], NAMES, preprocess=SMALL, store=store)
        for cut, message in ((third, "has 2 samples, but 10 were expected"), (third + 700, "is .* damaged")):
            answers.append(whole[:cut])
            with pytest.raises(DataError, match=rf"a\.tar {message}"):
                samples[0]
            assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
        answers.append(whole)
        assert [samples[index]["image"].shape for index in range(10)] == [(3, 40, 48)] * 10
        (kept,) = (tmp_path / "cache").glob("*.tar")
        kept.write_bytes(whole[:third])  # as an earlier version kept it
        assert Shards([(f"{address}/a.tar", 10)], NAMES, preprocess=SMALL, store=store)[9]["label"] in range(5)
        assert kept.read_bytes() == whole


def tar(path, *members):
    """Write a tar file with (name, content) members."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def picture(photo_folder):
    return (photo_folder / "class0" / "0.png").read_bytes()


def test_label_is_a_number_or_a_name(picture, tmp_path):
    tar(tmp_path / "a.tar", ("a/1.x.png", picture), ("a/1.cls", b" 3\n"), ("b/1.png", picture), ("b/1.cls", b"class2"))
    assert [sample["label"] for sample in map(dataset(tmp_path / "a.tar").__getitem__, range(2))] == [3, 2]
    tar(tmp_path / "b.tar", ("1.png", picture), ("1.cls", b"clas2"))
    with pytest.raises(DataError, match=r"b\.tar/1\.png: there is no class 'clas2'\. Nearest: class2"):
        dataset(tmp_path / "b.tar")[0]
    tar(tmp_path / "c.tar", ("1.png", picture), ("1.cls", b"5"))
    refuses(DataError, "no class '5'", lambda: dataset(tmp_path / "c.tar")[0])


def test_number_that_also_names_another_class_is_refused(picture, tmp_path):
    """With classes named 1 to 5, a number such as 1 could mean the class of this index or of this name."""
    for number in range(5):
        tar(tmp_path / f"{number}.tar", ("1.png", picture), ("1.cls", str(number).encode()))
    samples = Shards(find_shards(str(tmp_path / "*.tar")), "12345", preprocess=SMALL, store=Store("", 0))
    assert samples[0]["label"] == 0
    for number in range(1, 5):
        with pytest.raises(DataError, match=rf"{number}\.tar/1\.png: '{number}' is either class number {number}"):
            samples[number]


def test_invalid_shards_raise(picture, tmp_path):
    whole = tar(tmp_path / "a.tar", ("1.png", picture), ("1.cls", b"1"))
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "text.tar").write_bytes(b"no tar file" * 100)
    tar(tmp_path / "bare.tar", ("1.png", picture))
    tar(tmp_path / "two.tar", ("1.png", picture), ("1.jpg", picture), ("1.cls", b"1"))
    for name, message in [
        ("cut", "is cut short"), ("text", "is not a tar file"), ("bare", "needs one image and a .cls, but has png"),
        ("two", "has png, jpg, cls"), ("none", "no file matches"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            find_shards(str(tmp_path / f"{name}.tar"))
    tar(tmp_path / "no_image.tar", ("1.png", b"text"), ("1.cls", b"1"))
    with pytest.raises(DataError, match=r"no_image\.tar/1\.png is not an image that can be read"):
        dataset(tmp_path / "no_image.tar")[0]
    index = tmp_path / "index.json"
    for url, count in [
        ("/etc/passwd", 1), ("../a.tar", 1), ("file:///a.tar", 1), ("x::y.tar", 1), ("~/a.tar", 1), ("a.tar", 0),
    ]:  # fmt: skip
        index.write_text(json.dumps({"shardlist": [{"url": url, "nsamples": count}]}))
        with pytest.raises(DataError, match="must be in the index's folder"):
            find_shards(str(index))
    index.write_text(json.dumps({"shardlist": [{"url": "a.tar", "nsamples": 2}]}))
    refuses(DataError, "has 1 samples, but 2 were expected", lambda: dataset(index)[0])
    index.write_text("{}")
    refuses(DataError, "is not a valid index of shards", lambda: find_shards(str(index)))
    refuses(UsageError, "remote shards need an index", find_shards, "http://x/train-*.tar")


def test_links_and_outside_paths_in_a_shard_reach_no_other_file(picture, tmp_path):
    """Links and pipes are ignored. A member with ../ in its name is read from the shard and never written to disk."""
    place = tmp_path / "in" / "a.tar"
    place.parent.mkdir()
    with tarfile.open(place, "w") as archive:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
        for name, content in (("../../4.png", picture), ("../../4.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    samples = dataset(place)
    assert len(samples) == 1
    assert samples[0]["path"] == f"{place}/../../4.png"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_class_names_can_come_from_a_file(shards, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    where = str(shards[0] / "train.json")
    data = ShardData(where, where, class_names=str(tmp_path / "names.txt"), num_workers=0)
    assert data.class_names == tuple(NAMES)
    assert data.dataset("test") is None
    with pytest.raises(DataError, match="holds no class names"):
        ShardData(where, where, class_names=str(tmp_path / "nothing.txt"))


def test_a_resume_refuses_shards_that_were_added_or_changed(shards, tmp_path):
    shutil.copytree(shards[0], tmp_path / "a")
    shutil.copytree(shards[0], tmp_path / "elsewhere")

    def data(where, names=NAMES, **options):
        module = ShardData(str(tmp_path / where), str(tmp_path / where), class_names=names, num_workers=0, **options)
        module.setup("fit")
        return module

    def resumed(now, saved):
        now._compare({split: saved.listing(split) for split in ("train", "val")})

    saved = data("a/*.tar")
    assert list(saved.listing("train")) == [f"train-{number:03}.tar" for number in range(6)]
    resumed(data("elsewhere/*.tar"), saved)  # the folder does not matter
    resumed(data("elsewhere/train.json"), saved)
    (tmp_path / "elsewhere" / "train-002.tar").rename(tmp_path / "elsewhere" / "train-006.tar")
    message = r"the shards differ .* 1 removed \(train-002.tar\), 1 added \(train-006.tar\); restore them, or set "
    refuses(DataError, message, resumed, data("elsewhere/*.tar"), saved)
    resumed(data("elsewhere/*.tar", changed_ok=True), saved)
    refuses(DataError, "6 with other labels", resumed, data("a/*.tar", names=NAMES[::-1]), saved)
