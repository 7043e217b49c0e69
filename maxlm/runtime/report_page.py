"""Reports as HTML pages of one file, which need no network: their common style and
script."""

import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from maxlm.runtime.files import replace_file


def write_report_page(
    path: Path, package: str, title: str, data: Mapping[str, Any]
) -> None:
    """Writes ``report_head.html`` and a package's ``report.html``, with the title and
    data, atomically."""
    head = files("maxlm.runtime").joinpath("report_head.html").read_text("utf-8")
    body = files(package).joinpath("report.html").read_text("utf-8")
    # No "<" at all: "</script" would end the element, and "<!--<script" would keep it
    # open.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    values = {"{{title}}": escape(title), "{{data}}": text}
    # In one pass: a title may itself read "{{data}}".
    page = re.sub(
        r"\{\{(?:title|data)\}\}", lambda match: values[match.group()], head + body
    )
    with replace_file(path.absolute()) as new:
        new.write_text(page, "utf-8")
