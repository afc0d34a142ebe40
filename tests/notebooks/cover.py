"""Join some pictures of the notebooks into the picture at the top of the README.

python -m tests.notebooks.cover notebooks/pictures.jpg
"""

import base64
import io
import sys

from PIL import Image

from tests.notebooks.execute import HOME, code, read

ROWS = [
    [("06_your_images_your_model", 0)],
    [("01_soft_attention", 2), ("04_detection", 1)],
    [("06_your_images_your_model", 3)],
]
"""Rows of (notebook, index of the picture among the notebook's pictures)."""
WIDTH, GAP = 1400, 6  # pixels


def picture(name: str, number: int) -> Image.Image:
    outputs = (output for cell in code(read(HOME / "notebooks" / f"{name}.ipynb")) for output in cell.outputs)
    found = [data for output in outputs for kind, data in output.get("data", {}).items() if kind.startswith("image/")]
    return Image.open(io.BytesIO(base64.b64decode(found[number]))).convert("RGB")


def row(pictures: list[Image.Image]) -> list[Image.Image]:
    """Resize pictures to the same height, so that a row of them, with gaps, is WIDTH wide."""
    ratios = [picture.width / picture.height for picture in pictures]
    height = (WIDTH - GAP * (len(pictures) - 1)) / sum(ratios)
    return [
        picture.resize((round(height * ratio), round(height)), Image.Resampling.LANCZOS)
        for picture, ratio in zip(pictures, ratios, strict=True)
    ]


def main() -> None:
    rows = [row([picture(name, number) for name, number in line]) for line in ROWS]
    page = Image.new("RGB", (WIDTH, sum(line[0].height for line in rows) + GAP * (len(rows) - 1)), "white")
    y = 0
    for line in rows:
        x = 0
        for part in line:
            page.paste(part, (x, y))
            x += part.width + GAP
        y += line[0].height + GAP
    page.save(sys.argv[1], quality=88)


if __name__ == "__main__":
    main()
