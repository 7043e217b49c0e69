"""SWE-bench (Jimenez et al. 2024, 2310.06770) over local clones: predictions in, report out.

An instance has ``instance_id``, ``repo``, ``base_commit``, ``test_patch``, ``FAIL_TO_PASS`` and
``PASS_TO_PASS`` (lists of tests, or their JSON), and may have ``test_command``.
"""

import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import ExecutionResult, SandboxLimits, run_command
from maxlm.runtime.files import convert_write_errors

DEFAULT_TEST_COMMAND = "python -m pytest -rA -p no:cacheprovider"
LIMITS = SandboxLimits(1800, 4 << 30, 256, 1 << 30, 1024, 64 << 20)
_PASSED = ("PASSED", "XFAIL")
_OUTCOMES = (*_PASSED, "FAILED", "ERROR", "SKIPPED")
# As the benchmark's harness tries them.
_APPLY = """
git apply --verbose {patch} || git apply --verbose --reject {patch} ||
patch --batch --fuzz=5 -p1 -i {patch}
"""
# A model's changes of the tests' own files do not count.
_TEST = """
for file in {files}; do git checkout {commit} -- "$file" 2>/dev/null || rm -rf -- "$file"; done
git apply --verbose {patch} || exit 99
{command}
"""


def extract_patch(answer: str) -> str:
    """Return the patch in a model's answer: the first ``diff`` or ``patch`` fence or tag, or else
    the first of another name, or else the whole answer; "" if that holds no hunk."""
    named, others = [], []
    for pattern in (r"<([\w-]+)>(.*?)</\1>", r"```(\w*)[ \t]*\n(.*?)```"):
        for name, text in re.findall(pattern, answer, re.DOTALL):
            (named if name in ("diff", "patch") else others).append(text)
    patch = [*named, *others, answer][0].strip("\n") + "\n"
    return patch if re.search(r"^(@@ |diff --git )", patch, re.MULTILINE) else ""


def make_prediction(instance_id: str, model: str, answer: str) -> dict[str, str]:
    """Return a line of a predictions file, of a model's answer."""
    patch = extract_patch(answer)
    return {"instance_id": instance_id, "model_name_or_path": model, "model_patch": patch}


def evaluate_prediction(
    instance: Mapping[str, Any],
    patch: str,
    repositories: Path,
    limits: SandboxLimits = LIMITS,
    readable: Sequence[Path] = (),
) -> tuple[dict[str, Any], str]:
    """Apply a patch to a clone at an instance's commit and run its tests, in the sandbox.

    Args:
        repositories: a folder of clones: owner/name, owner__name or name.
        readable: folders that tests may read, such as a virtual environment.

    Returns:
        The instance's entry of the benchmark's report, and the log. Raises MaxlmError if the
        repository or the commit is missing.
    """
    report: dict[str, Any] = dict.fromkeys(
        ("patch_is_None", "patch_exists", "patch_successfully_applied", "resolved"), False
    )
    if not patch.strip():
        return report | {"patch_is_None": True}, ""
    report["patch_exists"] = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        top, names = Path(temporary), {"model": patch, "test": instance["test_patch"]}
        clone = top / "repository"
        _clone(instance, repositories, clone)
        for name, text in names.items():
            (top / f"{name}.patch").write_text(text)

        def run(script: str) -> ExecutionResult:
            command = ["/bin/sh", "-c", script]
            return run_command(command, limits, readable=readable, writable=[top], folder=clone)

        applied = run(_APPLY.format(patch=f"{top}/model.patch"))
        if not applied.passed:
            return report, applied.output
        report["patch_successfully_applied"] = True
        files = re.findall(r"^diff --git a/.* b/(.*)$", instance["test_patch"], re.MULTILINE)
        script = _TEST.format(
            files=" ".join(map(shlex.quote, files)) or '""',
            commit=instance["base_commit"],
            patch=f"{top}/test.patch",
            command=instance.get("test_command", DEFAULT_TEST_COMMAND),
        )
        tested = run(script)
    log = applied.output + tested.output
    if tested.exit_code == 99:
        raise MaxlmError("its test patch does not apply", where=instance["instance_id"])
    outcomes = parse_test_log("" if tested.status == "timed_out" else tested.output)
    report["tests_status"] = {
        group: {
            "success": [test for test in tests if outcomes.get(test) in _PASSED],
            "failure": [test for test in tests if outcomes.get(test) not in _PASSED],
        }
        for group in ("FAIL_TO_PASS", "PASS_TO_PASS")
        for tests in [_read_tests(instance[group])]
    }
    report["resolved"] = not any(each["failure"] for each in report["tests_status"].values())
    return report, log


def parse_test_log(log: str) -> dict[str, str]:
    """Return test to outcome, of the lines that ``pytest -rA`` ends with."""
    found = {}
    for words in (line.replace(" - ", " ").split() for line in log.splitlines()):
        if len(words) > 1 and words[0] in _OUTCOMES:
            found[words[1]] = words[0]  # The benchmark's lists have names up to a space, too.
    return found


def evaluate_predictions(
    predictions: Sequence[Mapping[str, Any]],
    instances: Sequence[Mapping[str, Any]],
    repositories: Path,
    *,
    logs: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate predictions: the last of each instance.

    Args:
        logs: a folder to write each instance's log to.
        options: see `evaluate_prediction`.

    Returns:
        The benchmark's report of a run (its schema 2), and each instance's own in ``instances``.
        In ``error_ids`` are those whose patch does not apply.
    """
    by_id = {each["instance_id"]: each for each in instances}
    patches = {each["instance_id"]: each["model_patch"] or "" for each in predictions}
    if unknown := [name for name in patches if name not in by_id]:
        raise MaxlmError(f"no instance of the predictions' {unknown[0]}", fix="check --instances")
    reports = {}
    for name, patch in patches.items():
        reports[name], log = evaluate_prediction(by_id[name], patch, repositories, **options)
        if logs:
            with convert_write_errors(logs):
                logs.mkdir(parents=True, exist_ok=True)
                (logs / f"{name}.log").write_text(log)
    completed = [name for name, each in reports.items() if each["patch_successfully_applied"]]
    empty = [name for name, each in reports.items() if each["patch_is_None"]]
    ids = {
        "submitted": list(patches),
        "completed": completed,
        "incomplete": [name for name in by_id if name not in patches],
        "resolved": [name for name in completed if reports[name]["resolved"]],
        "unresolved": [name for name in completed if not reports[name]["resolved"]],
        "empty_patch": empty,
        "error": [name for name in patches if name not in completed + empty],
    }
    counts = {f"{key}_instances": len(found) for key, found in ids.items() if key != "incomplete"}
    lists = {f"{key}_ids": sorted(found) for key, found in ids.items()}
    report = {"total_instances": len(by_id), **counts, **lists, "schema_version": 2}
    return report | {"instances": reports}


def _clone(instance: Mapping[str, Any], repositories: Path, target: Path) -> None:
    name, commit = instance["repo"], instance["base_commit"]
    places = [repositories / each for each in (name, name.replace("/", "__"), Path(name).name)]
    source = next((each for each in places if each.is_dir()), None)
    if source is None:
        what, fix = f"no clone of {name}", f"git clone it to {places[1]}"
        raise MaxlmError(what, where=str(repositories), fix=fix)
    # Linked files would change their owner in the source as well.
    clone = ["git", "clone", "--quiet", "--no-hardlinks", "--no-checkout", source, target]
    for command in (clone, ["git", "-C", target, "checkout", "--quiet", "--detach", commit]):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise MaxlmError(done.stderr.strip().splitlines()[-1], where=f"{source} at {commit}")


def _read_tests(value: str | list[str]) -> list[str]:
    return json.loads(value) if isinstance(value, str) else value
