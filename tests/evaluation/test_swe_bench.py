"""SWE-bench over a small repository with a bug: which patches resolve it, and the report's form."""

import json
import subprocess

import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import detect_isolation
from maxlm.evaluation.swe_bench import (
    DEFAULT_TEST_COMMAND,
    evaluate_predictions,
    extract_patch,
    make_prediction,
    parse_test_log,
)

BUGGY = """\
\"\"\"Small sums.\"\"\"


def add(a, b):
    return a - b


def negate(a):
    return -a


def double(a):
    return a * 2
"""
FIXED = BUGGY.replace("a - b", "a + b")
TESTS = """\
from sums import double, negate


def test_negate():
    assert negate(3) == -3


def test_double():
    assert double(3) == 6
"""
NEW_TESTS = TESTS.replace("import double", "import add, double") + (
    "\n\ndef test_add():\n    assert add(2, 3) == 5\n"
)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A folder of clones, an instance, and a function that makes patches from a file's new text."""
    folder = tmp_path_factory.mktemp("clones")
    clone = folder / "someone__sums"
    clone.mkdir()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True).stdout

    def diff(**files: str) -> str:
        for name, text in files.items():
            (clone / f"{name}.py").write_text(text)
        git("add", "--intent-to-add", ".")
        patch = git("diff")
        git("reset", "--quiet", "--hard")
        return patch

    git("init", "--quiet")
    (clone / "sums.py").write_text(BUGGY)
    (clone / "test_sums.py").write_text(TESTS)
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    base = git("rev-parse", "HEAD").strip()
    instance = {
        "instance_id": "someone__sums-1",
        "repo": "someone/sums",
        "base_commit": base,
        "patch": diff(sums=FIXED),
        "test_patch": diff(test_sums=NEW_TESTS, test_more="def test_more():\n    pass\n"),
        "test_command": f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {DEFAULT_TEST_COMMAND}",
        "FAIL_TO_PASS": json.dumps(["test_sums.py::test_add"]),
        "PASS_TO_PASS": ["test_sums.py::test_negate", "test_sums.py::test_double"],
    }
    # Later commits are not what patches apply to.
    (clone / "sums.py").write_text("raise ImportError\n")
    git("commit", "--quiet", "--all", "--message", "second")
    git("checkout", "--quiet", base)
    return folder, instance, diff


def evaluate(benchmark, patch, **options):
    folder, instance, _ = benchmark
    prediction = {
        "instance_id": instance["instance_id"],
        "model_name_or_path": "m",
        "model_patch": patch,
    }
    report = evaluate_predictions([prediction], [instance], folder, **options)
    return report, report["instances"][instance["instance_id"]]


def test_gold_patch_resolves(benchmark, tmp_path):
    report, own = evaluate(benchmark, benchmark[1]["patch"], logs=tmp_path / "logs")
    log = (tmp_path / "logs" / "someone__sums-1.log").read_text()
    assert own["resolved"], log
    assert own["patch_successfully_applied"]
    assert own["tests_status"] == {
        "FAIL_TO_PASS": {"success": ["test_sums.py::test_add"], "failure": []},
        "PASS_TO_PASS": {"success": benchmark[1]["PASS_TO_PASS"], "failure": []},
    }
    assert report["resolved_ids"] == report["completed_ids"] == ["someone__sums-1"]
    assert report["resolved_instances"] == report["total_instances"] == 1
    assert "test_more.py::test_more" in log
    assert (benchmark[0] / "someone__sums" / "sums.py").read_text() == BUGGY


@pytest.mark.parametrize("patch", ["", None, "\n"])
def test_empty_patch(benchmark, patch):
    report, own = evaluate(benchmark, patch)
    assert not own["patch_exists"]
    assert report["empty_patch_ids"] == ["someone__sums-1"]
    assert report["completed_instances"] == report["resolved_instances"] == 0


def test_patch_that_does_not_apply_is_an_error(benchmark):
    patch = benchmark[1]["patch"].replace("return a - b", "return something(else)")
    report, own = evaluate(benchmark, patch.replace("sums.py", "nowhere.py"))
    assert own["patch_exists"]
    assert not own["patch_successfully_applied"]
    assert report["error_ids"] == ["someone__sums-1"]


def test_patch_with_stale_context_applies_with_fuzz(benchmark):
    patch = benchmark[1]["patch"].replace("Small sums", "Sums that are small")
    assert evaluate(benchmark, patch)[1]["resolved"]


def test_patch_that_breaks_other_tests_does_not_resolve(benchmark):
    _, _, diff = benchmark
    report, own = evaluate(benchmark, diff(sums=FIXED.replace("a * 2", "a * 3")))
    assert not own["resolved"]
    assert own["tests_status"]["FAIL_TO_PASS"]["failure"] == []
    assert own["tests_status"]["PASS_TO_PASS"]["failure"] == ["test_sums.py::test_double"]
    assert report["unresolved_ids"] == ["someone__sums-1"]


def test_patch_of_the_tests_has_no_effect(benchmark):
    """The test patch's files are as the benchmark has them, also one that the model adds."""
    _, _, diff = benchmark
    cheat = diff(test_sums="def test_add():\n    pass\n", test_more="import nothing\n")
    _, own = evaluate(benchmark, cheat)
    assert own["tests_status"]["FAIL_TO_PASS"]["failure"] == ["test_sums.py::test_add"]
    assert not own["resolved"]
    assert evaluate(benchmark, diff(sums=FIXED, test_more="import nothing\n"))[1]["resolved"]


def test_hostile_patch_does_no_harm(benchmark, tmp_path):
    """Its code runs as the tests do: it cannot write beside its clone."""
    if detect_isolation() == "limits":
        pytest.skip("this machine isolates nothing but by limits")
    _, _, diff = benchmark
    target = tmp_path / "made"
    tmp_path.chmod(0o777)
    conftest = f"open({str(target)!r}, 'w').write('x')\n"
    _, own = evaluate(benchmark, diff(sums=FIXED, conftest=conftest))
    assert not target.exists()
    assert not own["resolved"]
    assert own["patch_successfully_applied"]


def test_missing_things_are_named(benchmark):
    folder, instance, _ = benchmark
    prediction = make_prediction(instance["instance_id"], "m", instance["patch"])
    with pytest.raises(MaxlmError, match="no clone of other/name"):
        evaluate_predictions([prediction], [instance | {"repo": "other/name"}], folder)
    with pytest.raises(MaxlmError, match="someone__sums at 0123"):
        evaluate_predictions([prediction], [instance | {"base_commit": "0123"}], folder)
    with pytest.raises(MaxlmError, match="test patch does not apply"):
        evaluate_predictions([prediction], [instance | {"test_patch": "nonsense"}], folder)
    with pytest.raises(MaxlmError, match="someone__sums-1"):
        evaluate_predictions([prediction], [], folder)
    report = evaluate_predictions([], [instance], folder)
    assert report["incomplete_ids"] == ["someone__sums-1"]


def test_patches_are_found_in_answers():
    patch = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n"
    fenced = f"Here:\n```python\ncode\n```\nand\n```diff\n{patch}```\nDone."
    assert extract_patch(fenced) == patch
    assert extract_patch(f"<patch>\n{patch}</patch>") == patch
    assert extract_patch(f"```\n{patch}```") == patch
    assert extract_patch(patch) == patch
    assert extract_patch("I cannot help with that.") == ""
    assert make_prediction("a__b-1", "m", fenced) == {
        "instance_id": "a__b-1",
        "model_name_or_path": "m",
        "model_patch": patch,
    }


def test_log_is_read_as_by_the_benchmark():
    log = """
=========================== short test summary info ============================
PASSED tests/a.py::test_one
PASSED tests/a.py::test_two[x y]
XFAIL tests/a.py::test_three - known
FAILED tests/a.py::test_four - AssertionError: PASSED tests/a.py::test_five
ERROR tests/b.py
1 passed
"""
    passed = {f"tests/a.py::{name}" for name in ("test_one", "test_two[x", "test_three")}
    assert parse_test_log(log) == passed


def test_command_writes_the_report(benchmark, tmp_path, capsys):
    from maxlm.cli.eval_code import run_swe_bench

    folder, instance, _ = benchmark
    predictions, instances = tmp_path / "predictions.jsonl", tmp_path / "instances.json"
    record = make_prediction(instance["instance_id"], "m", instance["patch"])
    predictions.write_text(json.dumps(record) + "\n")
    instances.write_text(json.dumps([instance]))
    run_swe_bench(predictions, instances, folder, output=tmp_path / "out")
    assert "resolved" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["resolved_ids"] == ["someone__sums-1"]
