"""Write shards with the webdataset library."""

import json

from webdataset import TarWriter

NAMES = [f"class{number}" for number in range(5)]


def write_shards(photos, folder, shards=6, each=10):
    """Write shards and their index, with the classes mixed; return path of a sample → (source file, label)."""
    folder.mkdir(parents=True)
    pictures = sorted(photos.rglob("*.png"), key=lambda path: (path.stem, path.parent.name))
    truth, listed = {}, []
    for shard in range(shards):
        name = f"train-{shard:03}.tar"
        with TarWriter(str(folder / name)) as writer:
            for place in range(shard * each, (shard + 1) * each):
                path = pictures[place]
                label = NAMES.index(path.parent.name)
                writer.write({"__key__": f"{place:04}", "png": path.read_bytes(), "cls": label, "json": {"a": 1}})
                truth[f"{folder / name}/{place:04}.png"] = path, label
        listed.append({"url": name, "nsamples": each})
    (folder / "train.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": listed}))
    return truth
