"""Draw every picture."""

from . import DRAWINGS, FOLDER, draw_all

draw_all()
print(
    f"{len(DRAWINGS)} pictures in {FOLDER.relative_to(FOLDER.parents[2])}"
)
