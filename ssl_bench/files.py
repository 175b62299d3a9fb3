"""Files that are whole or not there."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replace the file at once: nobody reads half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
