"""A plan as one HTML page that needs no network: ``report.html`` with the plan's JSON in it."""

import json
import os
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError


def render_report(plan: Mapping[str, Any]) -> str:
    """Renders the page of what :meth:`maxlm.plan.predict.RunPlan.to_json` returns.

    Raises:
        ValueError: a number that JSON does not have, such as infinity.
    """
    # No "<" at all: "</script" would end the element, and "<!--<script" would keep it open.
    data = json.dumps(plan, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {"{{title}}": escape(str(plan["name"])), "{{plan}}": data}
    template = files("maxlm.plan").joinpath("report.html").read_text("utf-8")
    # In one pass: a name may itself read "{{plan}}".
    return re.sub(r"\{\{(?:title|plan)\}\}", lambda found: parts[found.group()], template)


def write_report(plan: Mapping[str, Any], path: str | Path) -> None:
    """Writes the page atomically.

    Raises:
        MaxlmError: the file cannot be written.
    """
    path, page = Path(path), render_report(plan)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            temporary.write_text(page, "utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MaxlmError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(path),
            fix="name a file in a folder that exists and that you may write to",
        ) from error
