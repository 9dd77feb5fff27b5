"""``python -m companion``."""

from companion.cli import app

app(prog_name="companion")
