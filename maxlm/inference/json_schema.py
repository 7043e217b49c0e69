"""JSON schemas as the grammar compiler reads them.

llguidance refuses every ``format`` that it does not know, and the keywords
``propertyNames`` and ``uniqueItems``; pydantic writes all three. By JSON Schema a
format is a note that need not be checked: those that a pattern describes become one,
others go. Names of properties become properties, or a pattern of them. ``uniqueItems``
goes: no grammar keeps it.
"""

from typing import Any, NamedTuple

from maxlm.runtime.json_types import JsonObject

# What llguidance 1.9 checks itself; an unknown one is an error there.
_COMPILED_FORMATS = frozenset(
    (
        "date-time",
        "time",
        "date",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
    )
)

# Keywords whose values are data, in which nothing is a schema.
_DATA_KEYWORDS = frozenset(("const", "enum", "default", "example", "examples"))

# Keywords whose values are schemas by name: a property may be called "format".
_NAMED_SCHEMA_KEYWORDS = frozenset(
    (
        "properties",
        "patternProperties",
        "$defs",
        "definitions",
        "dependentSchemas",
        "dependencies",
    )
)


class CompilableSchema(NamedTuple):
    """A JSON schema that llguidance compiles as far as its other keywords allow."""

    schema: Any
    dropped_keywords: frozenset[str]
    """Keywords that restrict the schema's values, and that its grammar does not
    keep."""


def make_compilable_schema(schema: Any) -> CompilableSchema:
    """Returns a schema without the formats and keywords that llguidance refuses
    although they can be left out or written otherwise; the schema itself stays as it
    is.

    Args:
        schema: plain data, an object or a bool where it is a JSON schema; anything else
            is returned unchanged, for the compiler to say what is wrong with it.
    """
    dropped: set[str] = set()

    def rewrite(value: Any, root: Any) -> Any:
        if isinstance(value, list):
            return [rewrite(item, root) for item in value]
        if isinstance(value, dict):
            return rewrite_schema(value, root)
        return value

    def rewrite_schema(value: JsonObject, root: Any) -> JsonObject:
        if "$id" in value:
            root = value  # references within begin here
        rewritten: JsonObject = {}
        for keyword, argument in value.items():
            if keyword in _DATA_KEYWORDS:
                rewritten[keyword] = argument
            elif keyword in _NAMED_SCHEMA_KEYWORDS and isinstance(argument, dict):
                rewritten[keyword] = {
                    name: rewrite(item, root) for name, item in argument.items()
                }
            else:
                # Unknown keywords too: a reference may lead to a schema within one.
                rewritten[keyword] = rewrite(argument, root)
        if isinstance(value.get("propertyNames"), dict):
            names = _follow_reference(value["propertyNames"], root)
            _replace_property_names(rewritten, names)
        _replace_format(rewritten)
        if _drop_unique_items(rewritten):
            dropped.add("uniqueItems")
        return rewritten

    return CompilableSchema(rewrite(schema, schema), frozenset(dropped))


def _follow_reference(schema: JsonObject, root: Any) -> JsonObject:
    """Returns the schema that a schema refers to by ``#/...`` alone; itself where it
    does not."""
    reference = schema.get("$ref")
    if (
        len(schema) != 1
        or not isinstance(reference, str)
        or not reference.startswith("#/")
    ):
        return schema
    target = root
    for part in reference.removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(target, dict) or name not in target:
            return schema
        target = target[name]
    return target if isinstance(target, dict) else schema


def _replace_property_names(schema: JsonObject, names: JsonObject) -> None:
    """Writes what ``propertyNames`` asks for as properties or a pattern of them, if it
    is all that a schema says of names; the compiler refuses what is left.

    Args:
        names: the schema of names.
    """
    if schema.get("properties") or schema.get("patternProperties"):
        return
    values = schema.get("additionalProperties", True)
    conditions = {
        k: v for k, v in names.items() if k not in ("title", "description", "type")
    }
    match conditions:
        case {"enum": [*allowed], **rest} if not rest:
            schema["properties"] = {str(name): values for name in allowed}
        case {"const": str(name), **rest} if not rest:
            schema["properties"] = {name: values}
        case {"pattern": str(pattern), **rest} if not rest:
            schema["patternProperties"] = {pattern: values}
        case {"format": str(name), **rest} if not rest and name in _NAME_PATTERNS:
            schema["patternProperties"] = {f"^({_NAME_PATTERNS[name]})$": values}
        case {"minLength": int(), **rest} | {"maxLength": int(), **rest} if (
            not rest.keys() - {"maxLength"}
        ):
            least = conditions.get("minLength", 0)
            most = conditions.get("maxLength", "")
            schema["patternProperties"] = {rf"^[\s\S]{{{least},{most}}}$": values}
        case _:
            return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def _replace_format(schema: JsonObject) -> None:
    """Writes a format as a pattern, or drops it, where the compiler does not know
    it."""
    name = schema.get("format")
    if not isinstance(name, str) or name in _COMPILED_FORMATS:
        return
    conditions = schema.get("allOf", [])
    if not isinstance(conditions, list):
        return  # a mistake that the compiler names
    del schema["format"]
    if name in _FORMAT_PATTERNS:
        # Beside a pattern of the schema's own both hold.
        schema["allOf"] = [*conditions, {"pattern": f"^({_FORMAT_PATTERNS[name]})$"}]


def _drop_unique_items(schema: JsonObject) -> bool:
    """Removes ``uniqueItems``; returns whether a value may now be one that it
    forbids."""
    must_differ = schema.get("uniqueItems")
    if not isinstance(must_differ, bool):
        return False  # absent, or a mistake that the compiler names
    del schema["uniqueItems"]
    most = schema.get("maxItems")
    has_one_at_most = isinstance(most, int) and most <= 1
    return must_differ and not has_one_at_most


def _make_ipv6_pattern() -> str:
    """The eight groups of an IPv6 address, or fewer around one ``::`` (RFC 4291,
    2.2)."""
    group = "[0-9a-fA-F]{1,4}"
    forms = [
        f"({group}:){{7}}{group}",
        f"({group}:){{1,7}}:",
        f":(:{group}){{1,7}}",
        "::",
    ]
    # Before and behind the colons there is at least one group, at most seven together.
    for num_before in range(1, 7):
        most_behind = 7 - num_before
        forms.append(f"({group}:){{{num_before}}}(:{group}){{1,{most_behind}}}")
    return "|".join(forms)


def _make_ipv4_network_pattern(octet: str) -> str:
    """Addresses with a prefix's length behind whose bits all are 0; an address alone is
    /32."""
    forms = [rf"({octet}\.){{3}}{octet}(/32)?"]
    for length in range(32):
        num_whole = length // 8
        # Of the octet that the prefix ends in, as many upper bits as it reaches.
        step = 1 << (8 - length % 8)
        multiples = "|".join(str(value) for value in range(0, 256, step))
        octets = [*[octet] * num_whole, f"({multiples})", *["0"] * (3 - num_whole)]
        forms.append(r"\.".join(octets) + f"/{length}")
    return "|".join(forms)


def _make_ipv6_network_pattern(address: str) -> str:
    """As of IPv4, of networks whose groups all lie within the prefix: a group that it
    ends in the middle of is left out."""
    forms = [f"{address}(/128)?"]
    for num_groups in range(8):
        lengths = "|".join(str(length) for length in range(16 * num_groups, 129))
        opening = f"([0-9a-fA-F]{{1,4}}:){{{num_groups}}}:" if num_groups else "::"
        forms.append(f"{opening}/({lengths})")
    return "|".join(forms)


def _make_format_patterns() -> dict[str, str]:
    """Patterns of formats that pydantic and OpenAPI write, by name."""
    octet = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
    ipv4 = rf"({octet}\.){{3}}{octet}"
    ipv6 = f"({_make_ipv6_pattern()})"
    ipv4_network = _make_ipv4_network_pattern(octet)
    ipv6_network = _make_ipv6_network_pattern(ipv6)
    ipv4_interface = f"{ipv4}(/(3[0-2]|[12]?[0-9]))?"
    ipv6_interface = f"{ipv6}(/(12[0-8]|1[01][0-9]|[1-9]?[0-9]))?"
    patterns = {
        "base64": _make_base64_pattern("A-Za-z0-9+/"),
        "byte": _make_base64_pattern("A-Za-z0-9+/"),  # OpenAPI's name of it
        "base64url": _make_base64_pattern("A-Za-z0-9_-"),
        "ipvanyaddress": f"{ipv4}|{ipv6}",
        "fraction": "[+-]?[0-9]+(/0*[1-9][0-9]*)?",
        "ipv4network": ipv4_network,
        "ipv6network": ipv6_network,
        "ipvanynetwork": f"{ipv4_network}|{ipv6_network}",
        "ipv4interface": ipv4_interface,
        "ipv6interface": ipv6_interface,
        "ipvanyinterface": f"{ipv4_interface}|{ipv6_interface}",
    }
    for version in range(1, 9):
        patterns[f"uuid{version}"] = _make_uuid_pattern(str(version))
    return patterns


def _make_uuid_pattern(version: str) -> str:
    """The version is the third group's first digit, the variant the fourth's (RFC 9562,
    4)."""
    digit = "[0-9a-fA-F]"
    tail = f"{version}{digit}{{3}}-[89abAB]{digit}{{3}}-{digit}{{12}}"
    return f"{digit}{{8}}-{digit}{{4}}-{tail}"


def _make_base64_pattern(alphabet: str) -> str:
    """Groups of four characters, the last of them padded (RFC 4648, 4)."""
    char = f"[{alphabet}]"
    return f"({char}{{4}})*({char}{{2}}==|{char}{{3}}=)?"


_FORMAT_PATTERNS = _make_format_patterns()
# Names of properties have patterns alone, those of compiled formats too.
_NAME_PATTERNS = _FORMAT_PATTERNS | {
    "uuid": _make_uuid_pattern("[1-8]"),
    "date": "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
}
