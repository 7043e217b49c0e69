"""Checks that code is written plainly: check_plain.py [FOLDER_OR_FILE ...].

It finds places and says what to write instead; exit code 1: there are some. What it
cannot see is whether a stranger reads the code without stopping.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("maxlm", "pallas_kernels", "tests", "benchmarks", "docs")
# They say that you have something, and not what it is.
GENERIC_NAMES = {
    *("own", "what", "found", "given", "held", "kept", "told", "how", "made", "each"),
    *("wanted", "asked", "said"),
}
BROAD_ERRORS = {"AttributeError", "TypeError", "Exception", "BaseException"}
Finding = tuple[int, str]
"""Line, and what to write instead."""


def find_walruses(tree: ast.Module) -> Iterator[Finding]:
    tests = {
        node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.While)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.NamedExpr) and node not in tests:
            fix = (
                f"bind {node.target.id} in a statement before: a walrus is a whole test"
            )
            yield node.lineno, fix


def find_unlike_tuples(tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        if not isinstance(node.targets[0], ast.Tuple):
            continue
        targets = {ast.unparse(target) for target in node.targets[0].elts}
        names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
        shapes = {
            ast.unparse(value.func) if isinstance(value, ast.Call) else type(value)
            for value in node.value.elts
        }
        is_swap = bool(targets & names)
        if len(shapes) > 1 and not is_swap:
            yield node.lineno, "write one assignment a line: the values are unlike"


def find_generic_names(tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        if name in GENERIC_NAMES:
            yield node.lineno, f"say what {name} is: a shard, a message, a config"


def find_forwarded_kwargs(tree: ast.Module) -> Iterator[Finding]:
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        kwarg = function.args.kwarg
        if kwarg is None or ast.unparse(kwarg.annotation or ast.Name("Any")) != "Any":
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                value = keyword.value
                is_forwarded = isinstance(value, ast.Name) and value.id == kwarg.arg
                if keyword.arg is None and is_forwarded:
                    fix = "name the arguments, or pass one frozen dataclass"
                    yield node.lineno, f"**{kwarg.arg}: Any is passed on: {fix}"


def find_broad_excepts(tree: ast.Module, lines: list[str]) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.walk(node.type) if node.type else [ast.Name("Exception")]
        names = {part.id for part in caught if isinstance(part, ast.Name)}
        if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
            continue  # It hides nothing: the error goes on.
        # A comment above the clause, in its line, or above its first statement.
        clause = lines[node.lineno - 2 : node.body[0].lineno]
        if names & BROAD_ERRORS and not any("#" in line for line in clause):
            error = sorted(names & BROAD_ERRORS)[0]
            fix = "check the input first, or say in a comment why nothing else helps"
            yield node.lineno, f"except {error} hides our own bugs: {fix}"


def find_undeclared_args(tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", docstring, re.MULTILINE)
        if section is None:
            continue
        for entry in re.findall(r"^ {4}(\w+(?:, \w+)*):", section[1], re.MULTILINE):
            for name in set(entry.split(", ")) - list_arguments(node):
                yield node.lineno, f"{name} under Args is no argument of {node.name}"


def list_arguments(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """A class's are those of its `__init__`; without one, its fields."""
    if isinstance(node, ast.FunctionDef):
        return {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return list_arguments(statement)
    return {
        ast.unparse(statement.target)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }


def find_public_classes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.lineno, node.name


def main(arguments: list[str]) -> int:
    """Prints each place, and returns their number, at most 1."""
    roots = [Path(argument) for argument in arguments or FOLDERS]
    counts = defaultdict[str, int](int)
    classes = defaultdict[str, list[str]](list)
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            text = path.read_text()
            tree = ast.parse(text)
            findings = {
                "walruses inside expressions": find_walruses(tree),
                "tuples of unlike values": find_unlike_tuples(tree),
                "generic names": find_generic_names(tree),
                "forwarded **kwargs: Any": find_forwarded_kwargs(tree),
                "broad excepts": find_broad_excepts(tree, text.splitlines()),
                "Args that are no arguments": find_undeclared_args(tree),
            }
            for rule, places in findings.items():
                for line, message in places:
                    counts[rule] += 1
                    print(f"{path}:{line}: {message}")
            for line, name in find_public_classes(tree):
                classes[name].append(f"{path}:{line}")
    for name, places in classes.items():
        if len(places) > 1 and not all(place.startswith("tests") for place in places):
            counts["class names used twice"] += 1
            print(
                f"{places[1]}: {name} is also {places[0]}: give one a name of its own"
            )
    for rule, count in counts.items():
        print(f"{count:6,} {rule}", file=sys.stderr)
    return min(1, sum(counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
