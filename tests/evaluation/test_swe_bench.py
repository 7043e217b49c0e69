"""SWE-bench over a small repository with a bug: which patches resolve it, and the
report's form."""

import json
import subprocess

import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation import swe_bench
from maxlm.evaluation.sandbox import detect_isolation

BUGGY = "# Small sums\n\n\ndef add(a, b):\n    return a - b\n\n\ndef double(a):\n    return a * 2\n"
FIXED = BUGGY.replace("a - b", "a + b")
TESTS = "from sums import *\n\n\ndef test_double():\n    assert double(3) == 6\n"
NEW_TESTS = TESTS + "\n\ndef test_add():\n    assert add(2, 3) == 5\n"


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A folder of clones, an instance, and a function that makes patches from a file's
    new text."""
    folder = tmp_path_factory.mktemp("clones")
    clone = folder / "someone__sums"
    clone.mkdir()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=clone, check=True, capture_output=True, text=True
        ).stdout

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
        "test_patch": diff(
            test_sums=NEW_TESTS, test_more="def test_more():\n    pass\n"
        ),
        "test_command": f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "
        f"{swe_bench.DEFAULT_TEST_COMMAND}",
        "FAIL_TO_PASS": json.dumps(["test_sums.py::test_add"]),
        "PASS_TO_PASS": ["test_sums.py::test_double"],
    }
    # Later commits are not what patches apply to.
    (clone / "sums.py").write_text("raise ImportError\n")
    git("commit", "--quiet", "--all", "--message", "second")
    git("checkout", "--quiet", base)
    return folder, instance, diff


def evaluate(benchmark, patch):
    folder, instance, _ = benchmark
    prediction = {"instance_id": instance["instance_id"], "model_patch": patch}
    report = swe_bench.evaluate_predictions([prediction], [instance], folder)
    return report, report["instances"][instance["instance_id"]]


@pytest.mark.heavy
def test_command_reports_that_the_gold_patch_resolves(benchmark, tmp_path, capsys):
    from maxlm.cli.eval import evaluate_swe_bench

    folder, instance, _ = benchmark
    prediction = swe_bench.make_prediction("someone__sums-1", "m", instance["patch"])
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(json.dumps(prediction))
    instances = tmp_path / "instances.json"
    instances.write_text(json.dumps([instance]))
    evaluate_swe_bench(predictions, instances, folder, output=tmp_path / "out")
    assert "resolved" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["resolved_ids"] == report["completed_ids"] == ["someone__sums-1"]
    assert report["resolved_instances"] == report["total_instances"] == 1
    assert report["instances"]["someone__sums-1"]["tests_status"] == {
        "FAIL_TO_PASS": {"success": ["test_sums.py::test_add"], "failure": []},
        "PASS_TO_PASS": {"success": ["test_sums.py::test_double"], "failure": []},
    }
    log = (tmp_path / "out" / "someone__sums-1.log").read_text()
    assert "test_more.py::test_more" in log
    assert (folder / "someone__sums" / "sums.py").read_text() == BUGGY


def test_patches_that_are_empty_stale_or_wrong(benchmark):
    gold = benchmark[1]["patch"]
    for patch in ("", None, "\n"):
        report, instance_report = evaluate(benchmark, patch)
        assert not instance_report["patch_exists"]
        assert report["empty_patch_ids"] == ["someone__sums-1"]
    report, instance_report = evaluate(benchmark, gold.replace("sums.py", "nowhere.py"))
    assert instance_report["patch_exists"]
    assert not instance_report["patch_successfully_applied"]
    assert report["error_ids"] == ["someone__sums-1"]
    # Of other context, as when the file has changed a little, it still applies.
    stale = gold.replace("Small sums", "Sums that are small")
    _, instance_report = evaluate(benchmark, stale)
    assert instance_report["resolved"]


@pytest.mark.heavy
def test_patch_that_breaks_other_tests_does_not_resolve(benchmark):
    _, _, make_patch = benchmark
    patch = make_patch(sums=FIXED.replace("a * 2", "a * 3"))
    report, instance_report = evaluate(benchmark, patch)
    assert not instance_report["resolved"]
    status = instance_report["tests_status"]
    assert status["FAIL_TO_PASS"]["failure"] == []
    assert status["PASS_TO_PASS"]["failure"] == ["test_sums.py::test_double"]
    assert report["unresolved_ids"] == ["someone__sums-1"]


@pytest.mark.heavy
def test_patch_of_the_tests_has_no_effect(benchmark):
    """The test patch's files are as the benchmark has them, also one that the model
    adds."""
    _, _, make_patch = benchmark
    cheat = make_patch(
        test_sums="def test_add():\n    pass\n", test_more="import nothing\n"
    )
    _, instance_report = evaluate(benchmark, cheat)
    status = instance_report["tests_status"]
    assert status["FAIL_TO_PASS"]["failure"] == ["test_sums.py::test_add"]
    assert not instance_report["resolved"]
    with_broken_test = make_patch(sums=FIXED, test_more="import nothing\n")
    _, instance_report = evaluate(benchmark, with_broken_test)
    assert instance_report["resolved"]


@pytest.mark.heavy
def test_hostile_patch_does_no_harm(benchmark, tmp_path):
    if detect_isolation() == "limits":
        pytest.skip("this machine isolates nothing but by limits")
    target = tmp_path / "made"
    tmp_path.chmod(0o777)
    conftest = f"open({str(target)!r}, 'w').write('x')\n"
    _, _, make_patch = benchmark
    hostile = make_patch(sums=FIXED, conftest=conftest)
    _, instance_report = evaluate(benchmark, hostile)
    assert not target.exists()
    assert instance_report["patch_successfully_applied"]
    assert not instance_report["resolved"]


def test_missing_things_are_named(benchmark):
    folder, instance, _ = benchmark
    prediction = swe_bench.make_prediction(
        instance["instance_id"], "m", instance["patch"]
    )
    for changes, message in (
        ({"repo": "other/name"}, "no clone of other/name"),
        ({"base_commit": "0123"}, "someone__sums at 0123"),
        ({"test_patch": "nonsense"}, "test patch does not apply"),
    ):
        with pytest.raises(MaxlmError, match=message):
            swe_bench.evaluate_predictions([prediction], [instance | changes], folder)
    with pytest.raises(MaxlmError, match="someone__sums-1"):
        swe_bench.evaluate_predictions([prediction], [], folder)
    report = swe_bench.evaluate_predictions([], [instance], folder)
    assert report["incomplete_ids"] == ["someone__sums-1"]


def test_patches_are_found_in_answers():
    patch = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n"
    fenced = f"Here:\n```python\ncode\n```\nand\n```diff\n{patch}```\nDone."
    assert swe_bench.extract_patch(fenced) == patch
    assert swe_bench.extract_patch(f"<patch>\n{patch}</patch>") == patch
    assert swe_bench.extract_patch(f"```\n{patch}```") == patch
    assert swe_bench.extract_patch(patch) == patch
    assert swe_bench.extract_patch("I cannot help with that.") == ""
    assert swe_bench.make_prediction("a__b-1", "m", fenced)["model_patch"] == patch


def test_log_is_read_as_by_the_benchmark():
    log = "PASSED a.py::one\nPASSED a.py::two[x y]\nXFAIL a.py::three - known\nERROR b.py\n"
    log += "FAILED a.py::four - AssertionError: PASSED a.py::five\n1 passed\n"
    assert swe_bench.parse_passed_tests(log) == {
        "a.py::one",
        "a.py::two[x",
        "a.py::three",
    }
