"""SWE-bench (Jimenez et al. 2024, 2310.06770) over local clones: predictions in, report
out.

An instance has ``instance_id``, ``repo``, ``base_commit``, ``test_patch``,
``FAIL_TO_PASS`` and ``PASS_TO_PASS`` (lists of tests, or their JSON), and may have
``test_command``.
"""

import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import SandboxLimits, run_command
from maxlm.runtime.files import convert_write_errors

DEFAULT_TEST_COMMAND = "python -m pytest -rA -p no:cacheprovider"
# As the benchmark's harness tries them. A model's changes of the tests' own files do
# not count.
_APPLY = """
git apply --verbose .git/model || git apply --verbose --reject .git/model ||
patch --batch --fuzz=5 -p1 -i .git/model || exit 98
for file in {files}; do git checkout {commit} -- "$file" 2>/dev/null || rm -rf -- "$file"; done
git apply --verbose .git/test || exit 99
"""


def extract_patch(answer: str) -> str:
    """Return the patch in a model's answer: the first ``diff`` or ``patch`` fence or
    tag, or else the first of another name, or else the whole answer; "" if that holds
    no hunk."""
    found = re.findall(r"<([\w-]+)>(.*?)</\1>", answer, re.DOTALL)
    found += re.findall(r"```(\w*)[ \t]*\n(.*?)```", answer, re.DOTALL)
    found.sort(key=lambda each: each[0] not in ("diff", "patch"))
    patch = [*(text for _, text in found), answer][0].strip("\n") + "\n"
    return patch if re.search(r"^(@@ |diff --git )", patch, re.MULTILINE) else ""


def make_prediction(instance_id: str, model: str, answer: str) -> dict[str, str]:
    """Return a line of a predictions file, of a model's answer."""
    patch = extract_patch(answer)
    return {
        "instance_id": instance_id,
        "model_name_or_path": model,
        "model_patch": patch,
    }


def evaluate_prediction(
    instance: Mapping[str, Any],
    patch: str,
    repositories: Path,
    seconds: float = 1800.0,
    readable: Sequence[Path] = (),
) -> tuple[dict[str, Any], str]:
    """Apply a patch to an instance's clone, of those in `repositories`, and run the
    tests in the sandbox, where they may read the folders `readable` (a virtual
    environment). Return its entry of the benchmark's report, and the log. Raises
    MaxlmError without a clone or the commit."""
    limits = SandboxLimits(seconds, 4 << 30, 256, 1 << 30, 1024, 64 << 20)
    exists = bool(patch.strip())
    test_patch = instance["test_patch"]
    report: dict[str, Any] = {"patch_is_None": not exists, "patch_exists": exists}
    report |= {"patch_successfully_applied": False, "resolved": False}
    if not exists:
        return report, ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        clone = Path(temporary)
        commit = instance["base_commit"]
        _clone(instance["repo"], commit, repositories, clone)
        for name, text in (("model", patch), ("test", test_patch)):
            (clone / ".git" / name).write_text(text, "utf-8")
        run = partial(run_command, limits=limits, folder=clone, readable=readable)
        files = re.findall(r"^diff --git a/.* b/(.*)$", test_patch, re.MULTILINE)
        script = _APPLY.format(files=shlex.join(files), commit=shlex.quote(commit))
        applied = run(["/bin/sh", "-c", script])
        if applied.exit_code == 99:
            raise MaxlmError(
                "its test patch does not apply", where=instance["instance_id"]
            )
        if not applied.passed:
            return report, applied.output
        tested = run(
            ["/bin/sh", "-c", instance.get("test_command", DEFAULT_TEST_COMMAND)]
        )
    passed = parse_passed_tests("" if tested.status == "timed_out" else tested.output)
    report |= {"patch_successfully_applied": True, "resolved": True, "tests_status": {}}
    for group in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        tests = instance[group]
        tests = json.loads(tests) if isinstance(tests, str) else tests
        success, failure = (
            [t for t in tests if t in passed],
            [t for t in tests if t not in passed],
        )
        report["tests_status"][group] = {"success": success, "failure": failure}
        report["resolved"] &= not failure
    return report, applied.output + tested.output


def parse_passed_tests(log: str) -> set[str]:
    """Return the tests that passed, of the lines that ``pytest -rA`` ends with."""
    # The benchmark's lists have names up to a space, too. The last outcome of a name
    # counts.
    words = re.findall(
        r"^(PASSED|XFAIL|FAILED|ERROR|SKIPPED) +(\S+)", log, re.MULTILINE
    )
    outcomes = {name: outcome for outcome, name in words}
    return {
        name for name, outcome in outcomes.items() if outcome in ("PASSED", "XFAIL")
    }


def evaluate_predictions(
    predictions: Sequence[Mapping[str, Any]],
    instances: Sequence[Mapping[str, Any]],
    repositories: Path,
    logs: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate predictions, the last of each instance, with options of
    `evaluate_prediction`; write each one's log to `logs`. Return the benchmark's report
    of a run (schema 2; in ``error_ids`` are those whose patch does not apply), and each
    instance's own in ``instances``."""
    by_id = {each["instance_id"]: each for each in instances}
    patches = {each["instance_id"]: each["model_patch"] or "" for each in predictions}
    if unknown := [name for name in patches if name not in by_id]:
        raise MaxlmError(
            f"no instance of the predictions' {unknown[0]}", fix="check --instances"
        )
    reports = {}
    for name, patch in patches.items():
        reports[name], log = evaluate_prediction(
            by_id[name], patch, repositories, **options
        )
        if logs:
            with convert_write_errors(logs):
                logs.mkdir(parents=True, exist_ok=True)
                (logs / f"{name}.log").write_text(log, "utf-8")
    ids = {"submitted": set(patches), "incomplete": by_id.keys() - patches}
    fields = ("patch_successfully_applied", "resolved", "patch_is_None")
    for key, field in zip(
        ("completed", "resolved", "empty_patch"), fields, strict=True
    ):
        ids[key] = {name for name, each in reports.items() if each[field]}
    ids["unresolved"] = ids["completed"] - ids["resolved"]
    ids["error"] = ids["submitted"] - ids["completed"] - ids["empty_patch"]
    report: dict[str, Any] = {"total_instances": len(by_id), "schema_version": 2}
    for key, names in ids.items():
        report |= {f"{key}_instances": len(names), f"{key}_ids": sorted(names)}
    return report | {"instances": reports}


def _clone(name: str, commit: str, repositories: Path, target: Path) -> None:
    places = [
        repositories / each for each in (name, name.replace("/", "__"), Path(name).name)
    ]
    source = next((each for each in places if each.is_dir()), None)
    if source is None:
        what, fix = f"no clone of {name}", f"git clone it to {places[1]}"
        raise MaxlmError(what, where=str(repositories), fix=fix)
    # Linked files would change their owner in the source as well.
    clone = [
        "git",
        "clone",
        "--quiet",
        "--no-hardlinks",
        "--no-checkout",
        source,
        target,
    ]
    for command in (
        clone,
        ["git", "-C", target, "checkout", "--quiet", "--detach", commit],
    ):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise MaxlmError(
                done.stderr.strip().splitlines()[-1], where=f"{source} at {commit}"
            )
