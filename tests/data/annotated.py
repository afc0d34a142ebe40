"""Write the same few images with boxes in COCO's, Pascal VOC's and YOLO's layout, without the package's readers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "eel")
SCENES = {  # split → its images, 60 pixels high and 80 wide → (class, x1, y1, x2, y2) of each box
    "train": [
        [(0, 5, 6, 25, 36), (2, 40, 10, 79, 50)],
        [(1, 0, 0, 80, 60)],
        [],
        [(0, 12, 8, 30, 28), (0, 50, 30, 70, 55), (1, 33, 3, 45, 20)],
        [(2, 7, 9, 33, 44), (1, 60, 20, 78, 58)],
    ],
    "val": [[(1, 10, 12, 30, 40), (2, 35, 5, 75, 50)], [(0, 20, 20, 44, 48)]],
}
GAPS = (3, 17, 90)  # the category ids of NAMES; real COCO files have gaps between the ids too


def picture(path, seed, size=(60, 80)):
    """Write an image of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def pictures(root, place):
    """Write the images of SCENES to the paths that `place(root, split, name)` gives; return (split, number) → path."""
    names = {}
    for split, scenes in SCENES.items():
        for number in range(len(scenes)):
            names[split, number] = place(root, split, f"{split}_{number}.png")
            picture(names[split, number], seed=hash((split == "val", number)) % 1000)
    return names


def coco(root: Path):
    files = pictures(root, lambda root, split, name: root / f"{split}2017" / name)
    for split, scenes in SCENES.items():
        images, annotations = [], []
        for number, scene in enumerate(scenes):
            images.append({"id": 10 * number + 1, "file_name": files[split, number].name, "height": 60, "width": 80})
            for label, x1, y1, x2, y2 in scene:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 10 * number + 1,
                        "category_id": GAPS[label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1) / 2,
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": number, "name": name} for number, name in zip(GAPS, NAMES, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def coco_of_sixteen(root: Path):
    """Write sixteen images in COCO's layout, with eighty classes whose ids have gaps, as in COCO itself."""
    random = np.random.default_rng(0)
    numbers = sorted(random.choice(np.arange(1, 91), 80, replace=False).tolist())
    for split, count in (("train", 12), ("val", 4)):
        images, annotations = [], []
        for number in range(count):
            name = f"{number:012d}.jpg"
            picture(root / f"{split}2017" / name, number + count, (48, 64))
            images.append({"id": number, "file_name": name, "height": 48, "width": 64})
            for _ in range(random.integers(0, 4)):
                x, y = random.uniform(0, 40, 2) * (1, 0.7)
                box = [x, y, random.uniform(5, 24), random.uniform(5, 20)]
                category = int(random.choice(numbers))
                annotations.append(
                    {"id": len(annotations), "image_id": number, "category_id": category, "bbox": box, "iscrowd": 0}
                )
        categories = [{"id": number, "name": f"thing {number}"} for number in numbers]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def voc(root: Path):
    files = pictures(root, lambda root, split, name: root / "JPEGImages" / name)
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, scenes in SCENES.items():
        for number, scene in enumerate(scenes):
            objects = "".join(
                f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for label, x1, y1, x2, y2 in scene
            )
            size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
            stem = files[split, number].stem
            text = f"<annotation><filename>{stem}.png</filename>{size}{objects}</annotation>"
            (root / "Annotations" / f"{stem}.xml").write_text(text)
        names = [files[split, number].stem for number in range(len(scenes))]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return root


def yolo(root: Path):
    files = pictures(root, lambda root, split, name: root / "images" / split / name)
    for (split, number), file in files.items():
        lines = [
            f"{label} {(x1 + x2) / 160:.6f} {(y1 + y2) / 120:.6f} {(x2 - x1) / 80:.6f} {(y2 - y1) / 60:.6f}"
            for label, x1, y1, x2, y2 in SCENES[split][number]
        ]
        label_file = root / "labels" / split / f"{file.stem}.txt"
        label_file.parent.mkdir(parents=True, exist_ok=True)
        if lines:  # YOLO has no label file for an image without boxes
            label_file.write_text("\n".join(lines))
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return root


LAYOUTS = {"coco": coco, "voc": voc, "yolo": yolo}
