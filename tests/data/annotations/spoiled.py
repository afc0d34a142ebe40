"""A COCO folder with a known number of problems."""

import json

from tests.data.annotated import picture


def spoiled(root):
    """Add each kind of problem a known number of times to the folder that `annotated.coco` wrote."""
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())

    def add(image_id, box, category=3, **more):
        content["annotations"].append({"id": 900, "image_id": image_id, "category_id": category, "bbox": box, **more})

    add(1, [float("nan"), 2, 8, 9])
    add(1, [1, 2, float("inf"), 9])
    add(1, [1, 2, 3])
    add(1, None)
    add(1, [30, 20, -8, 9])
    add(1, [30, 20, 0, 9])
    add(1, [30, 20, 9, 0.4])
    add(1, [90, 20, 9, 9])
    add(1, [70, 50, 30, 30])
    add(1, [5, 6, 20, 30])
    add(1, [30, 30, 10, 10], category=4)
    add(555, [30, 30, 10, 10])
    content["images"].append({"id": 777, "file_name": "gone.png", "height": 60, "width": 80})
    content["images"].append({"id": 778, "file_name": "text.png", "height": 60, "width": 80})
    content["images"].append({"id": 779, "file_name": "other.png", "height": 61, "width": 80})
    content["images"].append({"id": 780, "file_name": "train_0.png", "height": 60, "width": 80})
    content["images"].append({"id": 781, "file_name": "twin.png", "height": 60, "width": 80})
    content["images"].append({"id": 782, "file_name": "leak.png", "height": 60, "width": 80})
    (root / "train2017" / "text.png").write_text("no image")
    picture(root / "train2017" / "other.png", 99)
    (root / "train2017" / "twin.png").write_bytes((root / "train2017" / "train_0.png").read_bytes())
    (root / "train2017" / "leak.png").write_bytes((root / "val2017" / "val_0.png").read_bytes())
    file.write_text(json.dumps(content))
    return root
