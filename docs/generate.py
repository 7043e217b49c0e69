"""Write the pages of docs/ that are made from the code: `make docs`.

settings.md and recipe.md come from the configs' JSON Schemas, as `maxlm config schema`
does; api.md keeps its text, and gets signatures and first paragraphs of docstrings
between its markers, families.md its tables of features (features.py). In README.md and the other pages the output of commands is written
anew (outputs.py).
"""

import ast
import inspect
import json
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
}
_LENGTHS = {"minLength": "≥", "minItems": "≥", "maxLength": "≤", "maxItems": "≤"}
_ALL = (
    "`include` names files that one builds on, or shipped configs. Types and limits "
    "are checked "
    "when a config is read; only what is required has no default. `make docs` makes "
    "this page from "
    "the code, and `maxlm config schema{option}` prints it for editors."
)
_RUN = (
    "Every setting of a run, in the order of its YAML file ([config.md](config.md)). "
    "On the "
    "command line: `maxlm train CONFIG train.steps=500`."
)
_RECIPE = "Every setting of a corpus recipe, which `maxlm corpus run` reads ([corpus.md](corpus.md))."


def settings_page(title: str, text: str, option: str, schema: dict[str, Any]) -> str:
    """Return a config's settings as Markdown, a section for each mapping in its JSON
    Schema."""
    titles: dict[str, str] = {}
    sections = list(_sections("", schema, schema["$defs"], titles))
    head = textwrap.fill(f"{text} {_ALL.format(option=option)}", 118)
    parts = [f"# {title}\n\n{head}"]
    for heading, node in sections:
        required = node.get("required", ())
        lines = [
            _setting(key, field, key in required, titles)
            for key, field in node["properties"].items()
        ]
        about = textwrap.fill(_prose(node.get("description", "")), 118)
        parts.append(
            "\n\n".join(filter(None, (f"## {heading}", about, "\n".join(lines))))
        )
    return "\n\n".join(parts) + "\n"


def _sections(path: str, node: dict[str, Any], defs: Any, titles: dict[str, str]):
    """Yield (heading, schema) of a mapping and of all below it, each class once."""
    yield titles.get(node.get("title", ""), "Top level"), node
    new = {}
    for key, field in node["properties"].items():
        for place, name in _references(f"{path}.{key}".lstrip("."), field):
            if name not in titles:
                tag = next(iter(_tags(field, name)), "")
                titles[name] = f"{place} ({tag})" if tag else place
                new[name] = place
    for name, place in new.items():
        yield from _sections(place, defs[name], defs, titles)


def _references(place: str, field: dict[str, Any]):
    """Yield (key, class) of every mapping that a field may hold."""
    if "$ref" in field:
        yield place, field["$ref"].rpartition("/")[2]
    for member in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from _references(place, member)
    for part, inner in (("N", "items"), ("NAME", "additionalProperties")):
        if isinstance(field.get(inner), dict):
            yield from _references(f"{place}.{part}", field[inner])


def _tags(field: Any, name: str):
    """Yield "kind: clm" of the union that tells its members apart by such a key."""
    if isinstance(field, dict):
        union = field.get("discriminator", {})
        for tag, reference in union.get("mapping", {}).items():
            if reference.endswith(f"/{name}"):
                yield f"{union['propertyName']}: {tag}"
        field = list(field.values())
    if isinstance(field, list):
        for member in field:
            yield from _tags(member, name)


def _setting(
    key: str, field: dict[str, Any], required: bool, titles: dict[str, str]
) -> str:
    default = field.get("default", ...)
    facts = [_kind(field, titles)]
    if required:
        facts.append("required")
    elif "discriminator" in field and isinstance(default, dict):
        facts.append(f"default {default[field['discriminator']['propertyName']]}")
    elif not isinstance(default, dict | type(...)) and "const" not in field:
        facts.append(f"default `{json.dumps(default, ensure_ascii=False)}`")
    text = f"- `{key}` — {', '.join(facts)}. {_prose(field.get('description', ''))}"
    return textwrap.fill(
        text.rstrip(),
        118,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _kind(field: dict[str, Any], titles: dict[str, str]) -> str:
    """Return a schema's type in words: "integer ≥ 1 or null"."""
    if "$ref" in field:
        title = titles[field["$ref"].rpartition("/")[2]]
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        shown = re.sub(r".*: (\w+)\)", r"\1", title)  # of a union, the member's tag
        return f"[{shown}](#{anchor})"
    union = field.get("anyOf") or field.get("oneOf")
    if union:
        return " or ".join(dict.fromkeys(_kind(member, titles) for member in union))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return "one of " + ", ".join(
            f"`{json.dumps(value)}`" for value in field["enum"]
        )
    limits = [
        f"{sign} {field[name]:,}" for name, sign in _LIMITS.items() if name in field
    ]
    lengths = [
        f"of length {sign} {field[name]}"
        for name, sign in _LENGTHS.items()
        if name in field
    ]
    kind = str(field.get("type", "any"))
    kind = {"array": "list", "object": "mapping"}.get(kind, kind)
    element = field.get("items") or field.get("additionalProperties")
    if isinstance(element, dict):
        kind += f" of ({_kind(element, titles)})"
    elif "prefixItems" in field:
        members = [_kind(member, titles) for member in field["prefixItems"]]
        kind += f" of ({', '.join(members)})"
    return " ".join([kind, " and ".join(limits + lengths)]).rstrip()


def _prose(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def fill_api(page: str) -> str:
    """Return api.md with what each marker, `<!-- api: module:name ... -->`, names."""

    def fill_section(section: re.Match[str]) -> str:
        marker = section[1]
        entries = []
        for reference in section[2].split():
            module, name = reference.split(":")
            entries.append(_entry(module, name))
        return "\n\n".join([marker, *entries, "<!-- end -->"])

    return re.sub(
        r"(<!-- api:([^>]*)-->).*?<!-- end -->", fill_section, page, flags=re.DOTALL
    )


def _entry(module: str, name: str) -> str:
    """Return one name's signature as it is written, and its docstring's first
    paragraph."""
    owner = None
    entry = import_module(module)
    for part in name.split("."):
        owner = entry
        entry = getattr(owner, part)
    docstring = inspect.getdoc(entry) or ""
    text = _prose(docstring.split("\n\n")[0])
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    signature = ""
    if not inspect.isclass(entry):
        node: Any = ast.parse(textwrap.dedent(inspect.getsource(entry))).body[0]
        if inspect.isclass(owner):
            node.args.args = node.args.args[1:]  # self, cls
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"\n{name}({ast.unparse(node.args)}){returns}"
    imported = name.split(".")[0]
    return f"```python\nfrom {module} import {imported}{signature}\n```\n{text}"


def pages() -> dict[str, str]:
    """Return the generated pages' text, by their file's name."""
    from maxlm.corpus.recipe import RecipeConfig
    from maxlm.run.config import RunConfig

    return {
        "settings.md": settings_page(
            "Settings of a run", _RUN, "", RunConfig.model_json_schema()
        ),
        "recipe.md": settings_page(
            "Settings of a corpus recipe",
            _RECIPE,
            " --recipe",
            RecipeConfig.model_json_schema(),
        ),
        "api.md": fill_api((DOCS / "api.md").read_text()),
    }


def families_page() -> str:
    """Return families.md with the tables that the presets and the families make."""
    from features import fill_families

    return fill_families((DOCS / "families.md").read_text())


if __name__ == "__main__":
    from outputs import list_pages, rewrite_page, run_command

    for name, text in pages().items():
        (DOCS / name).write_text(text)
    (DOCS / "families.md").write_text(families_page())
    for page in list_pages():
        page.write_text(rewrite_page(page, run_command), "utf-8")
