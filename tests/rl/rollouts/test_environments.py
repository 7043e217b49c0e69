"""Promise: an environment's rows and answers follow from its settings and the sample
alone; what a policy writes is worked out, never run."""

import json
import operator
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from maxlm.rl.environments import (
    ENVIRONMENTS,
    Environment,
    EnvironmentConfig,
    GeneratedRows,
    Reply,
    SingleTurnEnvironment,
)
from maxlm.rl.environments.addition import AdditionEnvironment
from maxlm.rl.environments.arithmetic import compute_arithmetic, format_number
from maxlm.rl.environments.calculator import CalculatorEnvironment
from maxlm.rl.environments.python_tool import PythonToolEnvironment
from maxlm.rl.prompts_file import write_prompts
from maxlm.rl.rollouts import environment_calls
from maxlm.rl.rollouts.environment_calls import EnvironmentCalls
from maxlm.rl.rollouts.episode import begin_episode
from maxlm.rl.samples import Prompt, Sample
from tests.errors import message

OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}


def make_sample(*turns: tuple[str, str]) -> Sample:
    episode = begin_episode(Prompt(0, (1,), {"prompt": "?"}), 0)
    episode.sample.turns += turns
    return episode.sample


def extend(children):
    return st.tuples(st.sampled_from([*OPERATORS]), children, children)


TREES = st.recursive(st.integers(-99, 99), extend, max_leaves=6)


def evaluate(tree) -> tuple[str, Fraction]:
    """A tree as text, and its value by Python's own operators on fractions."""
    if isinstance(tree, int):
        return (str(tree) if tree >= 0 else f"({tree})"), Fraction(tree)
    sign, left, right = tree
    left_text, left_value = evaluate(left)
    right_text, right_value = evaluate(right)
    value = Fraction(OPERATORS[sign](left_value, right_value))
    return f"({left_text} {sign} {right_text})", value


@settings(max_examples=100)
@given(TREES)
def test_arithmetic_is_exact(tree):
    try:
        text, expected = evaluate(tree)
    except ZeroDivisionError:
        return
    if len(text) > 200:
        return
    value = compute_arithmetic(text)
    assert value == expected
    written = format_number(value)
    assert abs(Fraction(written) - value) <= Fraction(1, 2 * 10**10)
    assert value.denominator > 1 or written == str(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12*",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "[1][0]",
        "a+1",
        "True+1",
        "'a'*9",
        "1j",
        "1/0",
        "1%0",
        "0**-1",
        "2**0.5",
        "9**9**9",
        "9**99999",
        "(9**999)**9",
        "1e999",
        "1" * 300,
        "(" * 150 + "1",
        "-" * 190,
        "1\0",
    ],
)
def test_other_texts_are_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"\w"):
        compute_arithmetic(text)
    assert time.perf_counter() - start < 1


def test_numbers_are_written_as_people_do():
    expected = {"0.1+0.2": "0.3", "1/3": "0.3333333333", "-7/2": "-3.5", "1e-12": "0"}
    expected |= {"2**10": "1024", "1.50*2": "3", "-1/3": "-0.3333333333"}
    assert {t: format_number(compute_arithmetic(t)) for t in expected} == expected


def test_a_calculator_answers_the_call_that_ends_a_turn():
    environment = CalculatorEnvironment(reply=" = {result};")
    assert environment.max_turns == 2
    rows = environment.open_prompts(3)
    row = rows[11]
    a, b = map(int, row["prompt"].removesuffix("=").split("*"))
    assert int(row["answer"]) == a * b
    assert row == environment.open_prompts(3)[11] != rows[12]

    def answer(turn: str) -> str | None:
        reply = environment.respond(make_sample(("assistant", turn)))
        return None if reply is None else reply.text

    assert answer("<calc>12*7</calc>") == " = 84;"
    assert answer("<calc>1</calc> or <calc> 2+2 </calc>\n") == " = 4;"
    assert answer("<calc>1/0</calc>") == " = error: division by zero;"
    assert answer("<calc>1</calc> is 1") is None
    assert answer("84") is None
    assert answer("</calc>") is None


def test_an_example_is_the_episode_that_the_environment_answers():
    environment = CalculatorEnvironment(reply="={result};", num_digits=3)
    row = environment.open_prompts(5)[13]
    call, closer, rest = environment.write_example(row).partition("</calc>")
    reply = environment.respond(make_sample(("assistant", call + closer)))
    assert reply is not None
    assert rest == reply.text + str(row["a"] * row["b"])


def test_a_share_of_the_rows_that_are_written_are_examples(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    environment = CalculatorEnvironment()
    assert write_prompts(environment, path, 499, seed=2, examples=0.3) == 499
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    is_example = ["<calc>" in row["completion"] for row in rows]
    # Four standard deviations of a draw of 499.
    assert abs(sum(is_example) - 0.3 * 499) < 4 * (499 * 0.3 * 0.7) ** 0.5
    for row, has_call in zip(rows, is_example, strict=True):
        assert has_call or row["completion"] == row["answer"]
    assert write_prompts(AdditionEnvironment(), path, 7) == 7
    assert all("completion" not in line for line in path.read_text().splitlines())
    error = message(write_prompts, AdditionEnvironment(), path, None)
    assert error.startswith("--count: kind=addition draws prompts without end; ")
    assert len(path.read_text().splitlines()) == 7
    assert write_prompts(AdditionEnvironment(num_rows=5), path, None) == 5

    source = tmp_path / "questions.jsonl"
    source.write_text(json.dumps({"prompt": "?"}))
    environment = SingleTurnEnvironment(files=(str(source),))
    error = message(write_prompts, environment, path, None, examples=1.0)
    assert "has no example: a row has no text 'answer'" in error


def test_sums_are_written_as_asked_and_wrong_ones_are_near(tmp_path):
    path = tmp_path / "sums.jsonl"
    environment = AdditionEnvironment(pad=True, reverse=True)
    write_prompts(environment, path, 400, seed=3, examples=0.25)
    errors = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        first, second = row["prompt"].removesuffix("=").split("+")
        assert (len(first), len(second), len(row["completion"])) == (2, 2, 3)
        total = int(first) + int(second)
        assert int(row["answer"][::-1]) == total
        errors.append(int(row["completion"][::-1]) - total)
    num_right = errors.count(0)
    assert abs(num_right - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5
    assert {*errors} == {
        0,
        *(tens + units for tens in (-10, 0, 10) for units in (-1, 0, 1)),
    }


@pytest.mark.heavy
def test_a_program_runs_in_the_sandbox():
    environment = PythonToolEnvironment(program_seconds=2, max_output_chars=50)

    def answer(program: str) -> str | None:
        turn = f"so\n<python>\n{program}\n</python>"
        reply = environment.respond(make_sample(("assistant", turn)))
        return None if reply is None else reply.text

    assert answer("print(12 * 7)") == "84"
    assert (answer("1 / 0") or "").endswith("ZeroDivisionError: division by zero")
    assert answer("print('a' * 60)") == "a" * 50
    assert answer("print(1, flush=True)\nwhile True: pass") == "1\nlonger than 2 s"
    assert environment.respond(make_sample(("assistant", "84"))) is None


@pytest.mark.heavy
def test_a_task_of_reasoning_gym():
    pytest.importorskip("zss")  # as an incomplete installation is
    config = {
        "kind": "reasoning_gym",
        "task": "basic_arithmetic",
        "settings": {"min_terms": 2, "max_terms": 2},
        "num_rows": 20,
        "instruction": " Answer with a number.",
    }
    environment = TypeAdapter(EnvironmentConfig).validate_python(config)
    rows = environment.open_prompts(4)
    assert rows.num_rows == 20
    row = rows[7]
    assert row == environment.open_prompts(4)[7]
    assert row != rows[8]
    assert row["prompt"] == f"{row['question']} Answer with a number."
    expression = row["metadata"]["expression"]
    assert compute_arithmetic(expression) == int(row["answer"])
    wrong = environment.model_copy(update={"task": "basic_arithmetics"})
    assert "did you mean basic_arithmetic?" in message(wrong.open_prompts, 4)
    wrong = environment.model_copy(update={"settings": {"min_terms": 0}})
    assert "environment.settings: reasoning-gym's basic_arithmetic does not" in message(
        wrong.open_prompts, 4
    )
    wrong = environment.model_copy(update={"settings": {"terms": 5}})
    assert "environment.settings" in message(wrong.open_prompts, 4)


def test_the_environment_of_the_documentation(monkeypatch):
    monkeypatch.setattr(ENVIRONMENTS, "_loaded", dict(ENVIRONMENTS._loaded))
    page = (Path(__file__).parents[3] / "docs/rl.md").read_text()
    section = page.partition("### An environment of one's own")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    exec(code, {"__name__": "documentation"})
    config = {"kind": "guess", "max_guesses": 3}
    environment = TypeAdapter(EnvironmentConfig).validate_python(config)
    assert environment.max_turns == 3
    row = environment.open_prompts(0)[2]
    assert row["answer"] == 74
    turns = {"x": "Write a number.", "9": "higher", "75": "lower", "74": None}
    for turn, expected in turns.items():
        sample = make_sample(("assistant", turn))
        sample = replace(sample, prompt=replace(sample.prompt, row=row))
        reply = environment.respond(sample)
        assert (reply and reply.text) == expected
        assert environment.score(sample) == (turn == "74")


class RandomlySlow(Environment):
    """Answers with the sample's number, later for smaller ones."""

    def open_prompts(self, seed: int) -> GeneratedRows:
        raise AssertionError("no prompts")

    def respond(self, sample: Sample) -> Reply | None:
        time.sleep(0.02 * (5 - sample.number))
        if sample.number == 2:
            raise ValueError("two")
        return Reply(str(sample.number)) if sample.number else None


def ask_about_five(calls: EnvironmentCalls) -> None:
    prompt = Prompt(7, (1,), {})
    for number in range(5):
        calls.ask(begin_episode(prompt, number))


def test_on_several_hosts_all_answers_come_together(monkeypatch):
    """In the order of asking, as process 0 sends them."""
    sent = []

    def broadcast(value):
        sent.append(value)
        return value

    monkeypatch.setattr(environment_calls.jax, "process_count", lambda: 2)
    monkeypatch.setattr(environment_calls, "broadcast_from_process_0", broadcast)
    calls = EnvironmentCalls(RandomlySlow(), max_threads=2, seconds=5)
    ask_about_five(calls)
    answers = calls.collect(wait_for_any=False)
    assert calls.episodes == []
    assert [episode.sample.number for episode, _ in answers] == [*range(5)]
    expected = "the environment failed at turn 0: ValueError: two"
    end, first, failed, *others = [answer for _, answer in answers]
    assert end is None
    assert [first, *others] == [Reply("1"), Reply("3"), Reply("4")]
    assert expected in str(failed)
    # Another process, which asks nobody.
    monkeypatch.setattr(environment_calls.jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        environment_calls, "broadcast_from_process_0", lambda _: sent[0]
    )
    other_calls = EnvironmentCalls(RandomlySlow(), max_threads=2, seconds=5)
    num_threads = threading.active_count()
    ask_about_five(other_calls)
    assert threading.active_count() == num_threads
    other_answers = other_calls.collect(wait_for_any=False)
    assert [str(a) for _, a in other_answers] == [str(a) for _, a in answers]


def test_answers_come_as_they_are_ready():
    first_may_answer = threading.Event()

    class FirstWaits(RandomlySlow):
        def respond(self, sample: Sample) -> Reply | None:
            if sample.number == 0:
                assert first_may_answer.wait(60)
            return Reply(str(sample.number))

    calls = EnvironmentCalls(FirstWaits(), max_threads=5, seconds=90)
    ask_about_five(calls)
    collected = []
    while len(calls.episodes) > 1:
        collected += calls.collect(wait_for_any=True)
    assert {episode.sample.number for episode, _ in collected} == {1, 2, 3, 4}
    first_may_answer.set()
    ((first, _),) = calls.collect(wait_for_any=True)
    assert first.sample.number == 0
