"""The page's HTML: its frame in a notebook, and the escaping of names."""

import re

import torch

from tests.explorer.explored import CLASSES, HOSTILE, PREPROCESS, photo, vit
from tests.explorer.pages import facts
from visionattn.explorer.explorer import explore
from visionattn.maps import RawAttention


def test_a_notebook_shows_the_whole_page_in_a_frame():
    page = explore(vit(), torch.randn(1, 3, 48, 64), steps=0, methods={"raw": RawAttention()}, class_names=CLASSES)
    shown = page._repr_html_()
    frame = re.fullmatch(r'<iframe sandbox="allow-scripts" [^<>]*? srcdoc="([^"<>]*)"></iframe>', shown)
    import html

    assert html.unescape(frame[1]) == page.html


def test_markup_in_names_stays_inside_the_json_data():
    page = explore(
        vit(), [photo()], preprocess=PREPROCESS, steps=0, class_names=CLASSES, model_name=HOSTILE,
        methods={"raw": RawAttention()},
    )  # fmt: skip
    assert "<img src=x" not in page.html
    assert page.html.count("</script>") == 3  # the JSON data, the arrays and the scripts
    assert facts(page)["model"] == HOSTILE
