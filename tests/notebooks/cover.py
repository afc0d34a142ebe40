"""Put some of the notebooks' pictures together: the picture at the head of README.

python -m tests.notebooks.cover notebooks/pictures.jpg
"""

import base64
import io
import sys

from PIL import Image

from tests.notebooks.execute import HOME, code, read

ROWS = [[("01_soft_attention", 2), ("04_detection", 1)], [("06_your_images_your_model", 2)]]
"""Notebook, and which of its pictures; those of a row get one height."""
WIDTH, GAP = 1400, 6


def picture(name: str, number: int) -> Image.Image:
    outputs = (output for cell in code(read(HOME / "notebooks" / f"{name}.ipynb")) for output in cell.outputs)
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return Image.open(io.BytesIO(base64.b64decode(found[number]))).convert("RGB")


def row(pictures: list[Image.Image]) -> list[Image.Image]:
    """At one height, together WIDTH wide."""
    height = (WIDTH - GAP * (len(pictures) - 1)) / sum(one.width / one.height for one in pictures)
    return [
        one.resize((round(height * one.width / one.height), round(height)), Image.Resampling.LANCZOS)
        for one in pictures
    ]


def main() -> None:
    rows = [row([picture(*which) for which in line]) for line in ROWS]
    page = Image.new("RGB", (WIDTH, sum(line[0].height for line in rows) + GAP * (len(rows) - 1)), "white")
    y = 0
    for line in rows:
        x = 0
        for one in line:
            page.paste(one, (x, y))
            x += one.width + GAP
        y += line[0].height + GAP
    page.save(sys.argv[1], quality=88)


if __name__ == "__main__":
    main()
