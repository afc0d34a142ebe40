"""Images in tar files (shards) in WebDataset's layout, for data larger than a disk.

A sample consists of consecutive members of a shard with the same name up to the first dot: KEY.jpg (or another image
suffix) and KEY.cls, which holds the number of the class, from 0, or its name (see `class_index`). A local shard is read
in place. A remote shard is downloaded completely into a cache folder of limited size. The index of a sample determines
its shard and its position in the shard. So the data set has no state to save, and interrupted training resumes exactly,
as with a folder of images.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.classes import class_index, class_names_in
from visionattn.data.datamodules import ClassificationData
from visionattn.data.decode import SUFFIXES, decode_image
from visionattn.data.listing import Listing, item_of
from visionattn.data.loading.batches import Split
from visionattn.data.loading.workers import Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform, prepare
from visionattn.errors import DataError, UsageError
from visionattn.files import Replacement

_OPEN = 32  # maximum number of shards that a process keeps open
_FETCH = 600.0  # seconds that a worker may take for one image, including the download of its shard
REMEDY = "in class_names, give the classes names that are not numbers"


@dataclass(frozen=True)
class Member:
    """A file inside a tar file: its name, and the offset and size of its content in bytes."""

    name: str
    at: int
    size: int


class Shard:
    """An open tar file.

    Args:
        handle: file descriptor, closed with the shard.
        url: name of the shard in error messages.

    Raises:
        DataError: the file is not a tar file or is cut short, or a sample lacks its image or its class.
    """

    def __init__(self, handle: int, url: str) -> None:
        self.url = url
        self._handle = handle
        size = os.fstat(handle).st_size
        self.samples: list[tuple[Member, Member]] = []
        sample: dict[str, Member] = {}
        key = None
        with os.fdopen(os.dup(handle), "rb") as file:
            file.seek(0)
            for member in _members(file, size, url):
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                if (folder, stem) != key:
                    self._add(sample)
                    key, sample = (folder, stem), {}
                sample[extension.lower()] = member
            self._add(sample)

    def __del__(self) -> None:
        os.close(self._handle)

    def content(self, member: Member) -> bytes:
        """Read the content of a member."""
        # os.pread does not use the file position, which forked processes share
        return os.pread(self._handle, member.size, member.at)

    def _add(self, sample: dict[str, Member]) -> None:
        if not sample:
            return
        images = [member for extension, member in sample.items() if os.path.splitext(f"x.{extension}")[1] in SUFFIXES]
        first = next(iter(sample.values())).name
        if len(images) != 1 or "cls" not in sample:
            raise DataError(
                f"{self.url}: the sample of {first} needs one image and a .cls, but has {', '.join(sample)}"
            )
        self.samples.append((images[0], sample["cls"]))


def _members(file: BinaryIO, size: int, url: str) -> list[Member]:
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.offset_data + info.size > size:
                    raise DataError(f"{url} is cut short")
                if info.isreg() and not info.issparse():
                    members.append(Member(info.name, info.offset_data, info.size))
    except tarfile.TarError as error:
        raise DataError(f"{url} is not a tar file, or is damaged: {error}") from error
    return members


class Shards(Dataset[Sample]):
    """The samples of many shards, one shard after the other.

    Args:
        shards: (path or URL, number of samples) of each shard.
        class_names: in the order of their numbers.
        preprocess: resizes and normalises each image.
        store: cache of remote shards.
        augment: changes each image before `preprocess` (default: no change).
        mixed: number of shards whose samples are shuffled together.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        class_names: Sequence[str],
        *,
        preprocess: Preprocess,
        store: "Store",
        augment: Transform | None = None,
        mixed: int = 8,
    ) -> None:
        self.shards = list(shards)
        self.class_names = tuple(class_names)
        self.preprocess = preprocess
        self.augment = augment
        self.mixed = mixed
        self.store = store
        self._ends = np.cumsum([count for _, count in self.shards])
        self._held: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_held": OrderedDict()}  # a file descriptor is not valid in another process

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, key)
        number, place = self._locate(index)
        shard = self._opened(number)
        image, label = shard.samples[place]
        name = f"{shard.url}/{image.name}"
        sample = prepare(decode_image(shard.content(image), name), self.preprocess, self.augment, seed)
        sample["label"], sample["path"] = self._label(shard.content(label), name), name
        return sample

    def path_of(self, index: int) -> str:
        """Return the shard and member of a sample; for a shard that is not open, the position in the shard."""
        number, place = self._locate(index)
        if number not in self._held:
            return f"sample {place} of {self.shards[number][0]}"
        return f"{self.shards[number][0]}/{self._held[number].samples[place][0].name}"

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Read the source of a sample by its path: (H, W, 3) uint8 RGB.

        Raises:
            DataError: no shard has a member with this path.
        """
        for number, (url, _) in enumerate(self.shards):
            if path.startswith(f"{url}/"):
                shard = self._opened(number)
                for image, _ in shard.samples:
                    if path == f"{url}/{image.name}":
                        return decode_image(shard.content(image), path)
        raise DataError(f"no shard holds {path}")

    def shuffled(self, seed: int) -> list[int]:
        """Return all indices in random order: shuffle the shards, then the samples within groups of `mixed` shards."""
        generator = torch.Generator().manual_seed(seed)
        begins = self._ends - [count for _, count in self.shards]
        order: list[int] = []
        for group in torch.randperm(len(self.shards), generator=generator).split(self.mixed):
            together = torch.cat([torch.arange(int(begins[n]), int(self._ends[n])) for n in group.tolist()])
            order += together[torch.randperm(len(together), generator=generator)].tolist()
        return order

    def _locate(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self.shards[number][1]

    def _opened(self, number: int) -> Shard:
        if number not in self._held:
            url, count = self.shards[number]
            self._held[number] = self.store.open(url, count)
            while len(self._held) > _OPEN:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]

    def _label(self, content: bytes, name: str) -> int:
        try:
            return class_index(content.decode("utf-8", "replace").strip(), self.class_names, remedy=REMEDY)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Store:
    """A cache folder of downloaded shards, shared by all processes of a machine.

    Attributes:
        folder: path of the cache; it must hold no other .tar files, since these could be deleted.
        limit: maximum size of the cache in bytes; the least recently used shards are deleted first.
    """

    folder: str
    limit: int

    def open(self, url: str, count: int) -> Shard:
        """Open a shard; download it first if it is remote and not in the cache.

        A download is kept only if it is complete, since servers that do not tell the length of a file can cut it short
        without an error. The shard stays readable after the cache deletes the file.

        Args:
            url: path or URL of the shard.
            count: number of samples that it must have.

        Raises:
            DataError: the shard cannot be read, is damaged or cut short, or has another number of samples.
        """
        if "://" not in url:
            return _complete(open_shard(url), url, count)
        os.makedirs(self.folder, exist_ok=True)
        digits = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        place = os.path.join(self.folder, f"{digits}.tar")
        with open(os.path.join(self.folder, f".{digits}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait here until the file is downloaded
            with contextlib.suppress(FileNotFoundError, DataError):  # a damaged file is downloaded again
                shard = _complete(os.open(place, os.O_RDONLY), url, count)
                os.utime(place)
                return shard
            return self._fetch(url, place, count)

    def _fetch(self, url: str, place: str, count: int) -> Shard:
        import fsspec

        new = Replacement(place)
        try:
            with fsspec.open(url, "rb") as source:
                new.write(lambda file: shutil.copyfileobj(source, file, 1 << 20))
            shard = _complete(open_shard(new.part), url, count)
            new.commit()
        except BaseException as error:  # each file system of fsspec has its own exceptions
            new.discard()
            if isinstance(error, DataError) or not isinstance(error, Exception):
                raise
            reason = error.__cause__ or error
            raise DataError(f"{url} cannot be fetched: {reason or type(reason).__name__}") from error
        self._make_room(place)
        return shard

    def _make_room(self, fetched: str) -> None:
        with os.scandir(self.folder) as entries:
            oldest = sorted(
                (e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in entries if e.name.endswith(".tar")
            )
        total = sum(size for _, size, _ in oldest)
        for _, size, path in oldest:
            if total > self.limit and path != fetched:
                Path(path).unlink(missing_ok=True)
                total -= size


def _complete(handle: int, url: str, count: int) -> Shard:
    """Return the shard; raise DataError if it has another number of samples."""
    shard = Shard(handle, url)
    if len(shard.samples) != count:
        raise DataError(f"{url} has {len(shard.samples)} samples, but {count} were expected")
    return shard


def open_shard(path: str) -> int:
    """Return a file descriptor of a shard; raise DataError if it cannot be opened."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def find_shards(where: str) -> list[tuple[str, int]]:
    """Find the shards of a split: (path or URL, number of samples) of each.

    Args:
        where: a pattern that matches local tar files, whose samples are then counted; or the path or URL of a .json
            index, `{"shardlist": [{"url": "train-000.tar", "nsamples": 1000}, …]}`, in the folder of the shards.

    Raises:
        UsageError: `where` is a URL that does not end in .json.
        DataError: there are no shards, or the index is not valid.
    """
    if not where.endswith(".json"):
        if "://" in where:
            raise UsageError(f"{where}: remote shards need an index; give the URL of a .json index")
        paths = sorted(glob(where, recursive=True))
        if not paths:
            raise DataError(f"no file matches {where}")
        return [(path, len(Shard(open_shard(path), path).samples)) for path in paths]
    import fsspec

    home = where.rpartition("/")[0]
    try:
        with fsspec.open(where, "rb") as file:
            listed = [(str(entry["url"]), int(entry["nsamples"])) for entry in json.load(file)["shardlist"]]
    except Exception as error:
        raise DataError(f"{where} is not a valid index of shards: {error or type(error).__name__}") from error
    shards = []
    for url, count in listed:
        name = url.removeprefix(f"{home}/")
        if "::" in name or "://" in name or name.startswith(("/", "~")) or ".." in name.split("/") or count < 1:
            raise DataError(f"{where}: {url!r} with {count} samples must be in the index's folder and not empty")
        shards.append((f"{home}/{name}" if home else name, count))
    if not shards:
        raise DataError(f"{where} names no shards")
    return shards


class ShardData(ClassificationData):
    """Images in WebDataset shards, local or remote (layout: see `visionattn.data.shards`).

    A checkpoint lists the shards in place of the images: a resume refuses shards that were added, removed or changed.

    Args:
        train, val, test: the shards of each split, see `find_shards`.
        class_names: a list of names, or the path of a text file with one name per line. Digits in a .cls file are
            an index into this list, from 0; other text is a name.
        cache: folder for remote shards (default: visionattn-shards in the system's folder for temporary files).
        cache_gb: limit on the size of `cache`, in GB (10⁹ bytes); it must hold at least `mixed` shards.
        mixed: number of shards whose samples are shuffled together in training.
        preprocess, augment, batch_size, num_workers, seed, unreadable, changed_ok: see `ImageFolderData`.
        worker_timeout: seconds that a worker may take for one image, including the download of its shard.

    Raises:
        DataError: there are no shards, or no class names.
        ValueError: mixed is < 1, or cache_gb is not > 0.
    """

    listed = "shards"

    def __init__(
        self,
        train: str,
        val: str,
        *,
        class_names: list[str] | str,
        test: str | None = None,
        cache: str | None = None,
        cache_gb: float = 50.0,
        mixed: int = 8,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        worker_timeout: float = _FETCH,
        changed_ok: bool = False,
    ) -> None:
        super().__init__(
            preprocess=preprocess or Preprocess(),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
            changed_ok=changed_ok,
        )
        if mixed < 1 or cache_gb <= 0:
            raise ValueError(f"mixed must be ≥ 1 and cache_gb > 0, got {mixed} and {cache_gb}")
        self.class_names = tuple(class_names_in(class_names))
        self.augment = augment
        self.mixed = mixed
        folder = cache or os.path.join(tempfile.gettempdir(), "visionattn-shards")
        self.store = Store(folder, round(1e9 * cache_gb))
        self._where: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self._found: dict[Split, list[tuple[str, int]]] = {}

    def _shards(self, split: Split) -> list[tuple[str, int]]:
        """Return the shards of a split, and an empty list if there is no such split."""
        where = self._where[split]
        if split not in self._found:  # counting the samples of local shards reads all of their headers
            self._found[split] = [] if where is None else find_shards(where)
        return self._found[split]

    def listing(self, split: Split) -> Listing:
        """Return the name and item of each shard; the names of the images in remote shards are unknown.

        The item of a shard is its size on this machine (−1 for a remote shard), and a hash of its number of samples and
        of the class names.
        """
        names = [name.encode("utf-8", "surrogateescape") for name in self.class_names]
        fixed = re.split(r"[*?[]", self._where[split] or "")[0]  # a pattern, up to its first wildcard
        home = fixed.rpartition("/")[0] + "/"
        return {
            url.removeprefix(home): item_of(Path(url), str(count).encode(), *names)
            for url, count in self._shards(split)
        }

    def dataset(self, split: Split) -> Shards | None:
        shards = self._shards(split)
        if not shards:
            return None
        return Shards(
            shards,
            self.class_names,
            preprocess=self.preprocess,
            augment=self.augment if split == "train" else None,
            mixed=self.mixed,
            store=self.store,
        )
