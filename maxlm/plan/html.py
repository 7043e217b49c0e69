"""A plan as one HTML page that needs no network: ``report.html`` with the plan's JSON in it."""

import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from maxlm.runtime.files import replace_file


def render_report(plan: Mapping[str, Any]) -> str:
    """Renders the page of what :meth:`maxlm.plan.predict.RunPlan.to_json` returns."""
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
    with replace_file(Path(path).absolute()) as new:
        new.write_text(render_report(plan), "utf-8")
