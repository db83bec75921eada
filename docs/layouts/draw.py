"""Draws the pictures of docs/layouts.md: `python docs/layouts/draw.py`."""

from pathlib import Path

from jaxserve.checkpoint import inspect
from jaxserve.checkpoint.locate import locate
from jaxserve.partitioning.layout_file import choose
from jaxserve.partitioning.picture import LayoutView

PICTURES = {
    "ws1d-heads": ("ws1d", "heads"),
    "ws2d-heads": ("ws2d", "heads"),
    "ws2d-batch": ("ws2d", "batch"),
    "ws2d-heads-batch": ("ws2d", "heads-batch"),
}
"""File -> layout and attention, of the embedded model on a mesh of 2 x 2 x 2."""


def pictures() -> dict[str, str]:
    """Returns file name -> SVG."""
    config = inspect(locate("tiny")).config
    found: dict[str, str] = {}
    for name, (layout, attention) in PICTURES.items():
        chosen = choose(config, "bfloat16", mesh="2,2,2", layout=layout, attention=attention)
        assert chosen is not None
        found[f"{name}.svg"] = LayoutView(chosen, config).svg() + "\n"
    return found


if __name__ == "__main__":
    for name, svg in pictures().items():
        (Path(__file__).parent / name).write_text(svg, encoding="utf-8")
