"""The command line."""

from companion.errors import MissingExtra, extra


def main() -> None:
    """Start the command line, or say in one line what it needs."""
    try:
        with extra("cli"):
            from companion.cli.app import app
    except MissingExtra as error:
        raise SystemExit(f"companion: {error}") from None
    app(prog_name="companion")
