"""Programs that are run against the tests of a row, in the sandbox of evaluation."""

import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import (
    ExecutionResult,
    SandboxLimits,
    detect_isolation,
    run_command,
    run_python,
)
from maxlm.rl.rewards.answers import AnswerReward, Extraction
from maxlm.rl.rewards.reward import Scorer, Worker, require_column
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping

# Runs a program whose input is its standard input; its errors are no part of its
# output.
_RUN_PROGRAM = """
import os, sys
program = os.fdopen(int(sys.argv[1]), "rb").read()
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
sys.path.append(sys.argv[2])
sys.argv[:] = ["program.py"]
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
"""
# Calls a function of a program, and writes the result to a descriptor that the program
# is not told of. The expected value is not here.
_CALL_FUNCTION = """
import json, os, sys
channel = int(sys.argv[1])
program, call = json.loads(os.fdopen(int(sys.argv[2]), "rb").read())
sys.path.append(sys.argv[3])
sys.argv[:] = ["program.py"]
names = {"__name__": "program"}
exec(compile(program, "program.py", "exec"), names)
function = names.get(call["function"])
if function is None:
    solution = names["Solution"]()
    function = getattr(solution, call["function"])
result = function(*call["arguments"])
os.write(channel, json.dumps(result).encode())
"""
# Runs tests beside a program's names, except those that would stand for a builtin, and
# compares no object whose class is the program's to decide what it equals: `assert f(1)
# == 2` is to compare numbers. Functions are inner ones, out of the program's reach.
_RUN_TESTS = """
import ast, builtins, os, sys, types

def run(answer, tests):
    table = dict(vars(builtins))
    get_mro = type.__dict__["__mro__"].__get__
    get_names = type.__dict__["__dict__"].__get__
    libraries = (os.path.dirname(os.__file__), sys.path[-1])
    tree = ast.parse(tests)

    def is_plain(value):
        kind = type(value)
        equals = next(names["__eq__"] for names in map(get_names, get_mro(kind)) if "__eq__" in names)
        if isinstance(equals, types.FunctionType):
            if not equals.__code__.co_filename.startswith(libraries):
                return False
        elif not isinstance(equals, types.WrapperDescriptorType):
            return False
        mro = get_mro(kind)
        if dict in mro:
            return all(is_plain(k) and is_plain(v) for k, v in dict.items(value))
        for container in (list, tuple, set, frozenset):
            if container in mro:
                return all(is_plain(item) for item in container.__iter__(value))
        return True

    def require_plain(value):
        if not is_plain(value):
            raise AssertionError("a class of the program's decides what is equal")
        return value

    class Guard(ast.NodeTransformer):
        def guard(self, node):
            function = ast.Name("__require_plain__", ast.Load())
            return ast.copy_location(ast.Call(function, [node], []), node)

        def visit_Compare(self, node):
            self.generic_visit(node)
            node.left = self.guard(node.left)
            node.comparators = [self.guard(part) for part in node.comparators]
            return node

    code = compile(ast.fix_missing_locations(Guard().visit(tree)), "tests.py", "exec")
    names = {"__name__": "answer"}
    exec(compile(answer, "answer.py", "exec"), names)
    names = {k: v for k, v in names.items() if k not in table}
    exec(code, {**names, "__require_plain__": require_plain, "__builtins__": table})
"""


@dataclass(frozen=True)
class ProgramTest:
    """A test of a program: what it reads and writes, or a call of a function of its and
    the result, or statements that fail."""

    kind: Literal["program", "call", "statements"]
    source: Any
    """Text that it reads; {function, arguments}; or the statements."""
    expected: Any = None


class CodeReward(AnswerReward):
    """Runs the program in an answer against the row's tests, in the sandbox of
    ``maxlm eval``.

    The column ``tests`` holds one of

    - statements in Python, or a list of such texts, which are run behind the program
      and fail: ``assert add(1, 2) == 3``. The program runs in the same process: it can
      read them;
    - ``{inputs: [...], outputs: [...]}``, or a list of ``{input, output}``: texts that
      the program reads and writes, compared line by line without spaces at the ends;
    - the same with ``fn_name``: arguments of a function of the program, or of its class
      ``Solution``, and results, compared as JSON outside the sandbox.
    """

    kind: str = "code"
    extract: Extraction = "code_block"
    time_limit: float = Field(default=120.0, gt=0)
    """Seconds that all tests of a sample may take."""
    tests: str = "tests"
    """Column of the tests."""
    credit: Literal["all", "fraction"] = "all"
    """What is scored: 1 if all tests pass; or the share of those that do."""
    test_seconds: float = Field(default=5.0, gt=0)
    """Seconds that one test may take; a program that takes longer fails it."""
    memory_bytes: int = Field(default=1 << 30, gt=0)
    """Memory of a program."""
    max_tests: int | None = Field(default=None, gt=0)
    """Tests that are run, the first; null: all."""
    num_programs: int | None = Field(default=None, gt=0)
    """Programs at once; null: one a core."""

    @property
    def worker(self) -> Worker:
        return "thread"

    @property
    def concurrency(self) -> int:
        return self.num_programs or os.cpu_count() or 1

    def check_setup(self) -> None:
        detect_isolation()

    def check_row(self, row: JsonMapping) -> None:
        self._read_tests(row)

    def open(self) -> Scorer:
        detect_isolation()
        return self.score

    def score(self, sample: Sample) -> float:
        program = self.read_answer(sample)
        if program is None:
            return 0.0
        tests = self._read_tests(sample.prompt.row)
        limits = SandboxLimits(self.test_seconds, self.memory_bytes)
        num_passed = 0
        for test in tests:
            has_passed = run_test(program, test, limits)
            num_passed += has_passed
            if self.credit == "all" and not has_passed:
                return 0.0
        return num_passed / len(tests)

    def _read_tests(self, row: JsonMapping) -> list[ProgramTest]:
        value = require_column(row, self.tests, "tests")
        tests = read_tests(value)
        if not tests:
            message = f"no tests that can be read in the column {self.tests!r}"
            fix = "give statements, {input, output} or {inputs, outputs}"
            raise MaxlmError(message, fix=fix)
        if self.credit == "all" and tests[0].kind == "statements":
            # One process for all.
            lines = [str(test.source) for test in tests[: self.max_tests]]
            return [ProgramTest("statements", "\n".join(lines))]
        return tests[: self.max_tests]


def read_tests(value: object) -> list[ProgramTest]:
    """Returns the tests of a column, as :class:`CodeReward` describes; none: it holds
    none that can be read."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [ProgramTest("statements", value)] if str(value).strip() else []
    if isinstance(value, Mapping):
        inputs = value.get("inputs")
        outputs = value.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            return []
        if len(inputs) != len(outputs):
            return []
        pairs = [
            {"input": text, "output": expected}
            for text, expected in zip(inputs, outputs, strict=True)
        ]
        return _read_pairs(pairs, value.get("fn_name"))
    if not isinstance(value, list):
        return []
    if all(isinstance(test, str) for test in value):
        return [ProgramTest("statements", test) for test in value]
    return _read_pairs(value, None)


def _read_pairs(pairs: Sequence[object], function: object) -> list[ProgramTest]:
    tests = []
    for pair in pairs:
        if not isinstance(pair, Mapping) or not {"input", "output"} <= set(pair):
            return []
        name = pair.get("fn_name", function)
        source = pair["input"]
        if name is None:
            test = ProgramTest("program", _join(source), _join(pair["output"]))
        else:
            arguments = source if isinstance(source, list) else [source]
            call = {"function": str(name), "arguments": arguments}
            test = ProgramTest("call", call, pair["output"])
        tests.append(test)
    return tests


def _join(value: object) -> str:
    """A text, of which some data sets have the lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def run_test(program: str, test: ProgramTest, limits: SandboxLimits) -> bool:
    """Runs a program against one test; tells whether it passes."""
    if test.kind == "statements":
        statements = f"{_RUN_TESTS}\nrun({program!r}, {test.source!r})"
        return run_python(statements, limits).passed
    if test.kind == "program":
        num_bytes = len(str(test.expected).encode("utf-8", "replace"))
        output_bytes = max(limits.output_bytes, 2 * num_bytes)
        limits = SandboxLimits(
            limits.seconds, limits.memory_bytes, output_bytes=output_bytes
        )
        result = _run_program(program, str(test.source), limits)
        has_ended = result.status == "passed"
        return has_ended and _split_lines(result.output) == _split_lines(test.expected)
    return _call_function(program, test, limits)


def _split_lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _run_program(program: str, text: str, limits: SandboxLimits) -> ExecutionResult:
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as file:
        stdin.write(text.encode("utf-8", "surrogatepass"))
        file.write(program.encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        file.seek(0)
        packages = sysconfig.get_path("purelib")
        command = [sys.executable, "-ISBc", _RUN_PROGRAM, str(file.fileno()), packages]
        return run_command(command, limits, files=(stdin.fileno(), file.fileno()))


def _call_function(program: str, test: ProgramTest, limits: SandboxLimits) -> bool:
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as channel,
        tempfile.TemporaryFile() as file,
    ):
        file.write(json.dumps([program, test.source]).encode())
        file.seek(0)
        files = (stdin.fileno(), channel.fileno(), file.fileno())
        packages = sysconfig.get_path("purelib")
        command = [sys.executable, "-ISBc", _CALL_FUNCTION]
        command += [str(channel.fileno()), str(file.fileno()), packages]
        result = run_command(command, limits, files=files)
        channel.seek(0)
        text = channel.read()
    if not result.passed:
        return False
    try:
        returned = json.loads(text)
    except ValueError:
        return False
    # By JSON a tuple is a list; some data sets have a result in a list of its own.
    return returned == test.expected or [returned] == test.expected
