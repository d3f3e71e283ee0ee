"""The report's files: one page, and a folder of its pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

from data.output_streams import naming_the_file
from inference.report_page.page import Section


def write_report(path: Path, html: str, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all, and its pictures; return their folder."""
    folder = path.with_name(path.stem + "-pictures")
    with naming_the_file("output", path):
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(html, encoding="utf-8")
        os.replace(aside, path)
        for picture in (picture for section in sections for picture in section.pictures):
            (folder / f"{picture.name}.png").write_bytes(picture.png)
    return folder
