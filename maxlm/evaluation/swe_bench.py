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
from collections.abc import Sequence
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.evaluation.records import Record
from maxlm.evaluation.sandbox import ExecutionResult, SandboxLimits, run_command
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.json_types import JsonMapping

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
    blocks = re.findall(r"<([\w-]+)>(.*?)</\1>", answer, re.DOTALL)
    blocks += re.findall(r"```(\w*)[ \t]*\n(.*?)```", answer, re.DOTALL)
    named = [text for name, text in blocks if name in ("diff", "patch")]
    others = [text for name, text in blocks if name not in ("diff", "patch")]
    candidates = [*named, *others, answer]
    patch = candidates[0].strip("\n") + "\n"
    has_hunk = re.search(r"^(@@ |diff --git )", patch, re.MULTILINE)
    return patch if has_hunk else ""


def make_prediction(instance_id: str, model: str, answer: str) -> dict[str, str]:
    """Return a line of a predictions file, of a model's answer."""
    patch = extract_patch(answer)
    return {
        "instance_id": instance_id,
        "model_name_or_path": model,
        "model_patch": patch,
    }


def evaluate_prediction(
    instance: JsonMapping,
    patch: str,
    repositories: Path,
    seconds: float = 1800.0,
    readable: Sequence[Path] = (),
) -> tuple[Record, str]:
    """Apply a patch to an instance's clone, of those in `repositories`, and run the
    tests in the sandbox, where they may read the folders `readable` (a virtual
    environment). Return its entry of the benchmark's report, and the log. Raises
    MaxlmError without a clone or the commit."""
    limits = SandboxLimits(
        seconds=seconds,
        memory_bytes=4 << 30,
        processes=256,
        file_bytes=1 << 30,
        open_files=1024,
        output_bytes=64 << 20,
    )
    has_patch = bool(patch.strip())
    test_patch = instance["test_patch"]
    report: Record = {
        "patch_is_None": not has_patch,
        "patch_exists": has_patch,
        "patch_successfully_applied": False,
        "resolved": False,
    }
    if not has_patch:
        return report, ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        clone = Path(temporary)
        commit = instance["base_commit"]
        _clone(instance["repo"], commit, repositories, clone)
        (clone / ".git" / "model").write_text(patch, "utf-8")
        (clone / ".git" / "test").write_text(test_patch, "utf-8")

        def run_script(script: str) -> ExecutionResult:
            command = ["/bin/sh", "-c", script]
            return run_command(command, limits, folder=clone, readable=readable)

        files = re.findall(r"^diff --git a/.* b/(.*)$", test_patch, re.MULTILINE)
        script = _APPLY.format(files=shlex.join(files), commit=shlex.quote(commit))
        applied = run_script(script)
        if applied.exit_code == 99:  # of _APPLY: the test patch
            message = "its test patch does not apply"
            raise MaxlmError(message, where=instance["instance_id"])
        if not applied.passed:
            return report, applied.output
        tested = run_script(instance.get("test_command", DEFAULT_TEST_COMMAND))
    passed: set[str] = set()
    if tested.status != "timed_out":
        passed = parse_passed_tests(tested.output)
    tests_status = {}
    is_resolved = True
    for group in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        tests = instance[group]
        if isinstance(tests, str):
            tests = json.loads(tests)
        success = [test for test in tests if test in passed]
        failure = [test for test in tests if test not in passed]
        tests_status[group] = {"success": success, "failure": failure}
        if failure:
            is_resolved = False
    report["patch_successfully_applied"] = True
    report["resolved"] = is_resolved
    report["tests_status"] = tests_status
    return report, applied.output + tested.output


def parse_passed_tests(log: str) -> set[str]:
    """Return the tests that passed, of the lines that ``pytest -rA`` ends with."""
    # The benchmark's lists have names up to a space, too. The last outcome of a name
    # counts.
    pattern = r"^(PASSED|XFAIL|FAILED|ERROR|SKIPPED) +(\S+)"
    outcomes: dict[str, str] = {}
    for outcome, name in re.findall(pattern, log, re.MULTILINE):
        outcomes[name] = outcome
    return {
        name for name, outcome in outcomes.items() if outcome in ("PASSED", "XFAIL")
    }


def evaluate_predictions(
    predictions: Sequence[JsonMapping],
    instances: Sequence[JsonMapping],
    repositories: Path,
    logs: Path | None = None,
    *,
    seconds: float = 1800.0,
    readable: Sequence[Path] = (),
) -> Record:
    """Evaluate predictions, the last of each instance, as `evaluate_prediction` does;
    write each one's log to `logs`. Return the benchmark's report of a run (schema 2; in
    ``error_ids`` are those whose patch does not apply), and each instance's own in
    ``instances``."""
    instances_by_id = {instance["instance_id"]: instance for instance in instances}
    patches: dict[str, str] = {}
    for prediction in predictions:
        patches[prediction["instance_id"]] = prediction["model_patch"] or ""
    for name in patches:
        if name not in instances_by_id:
            message = f"no instance of the predictions' {name}"
            raise MaxlmError(message, fix="check --instances")
    reports: dict[str, Record] = {}
    for name, patch in patches.items():
        reports[name], log = evaluate_prediction(
            instances_by_id[name], patch, repositories, seconds, readable
        )
        if logs:
            with convert_write_errors(logs):
                logs.mkdir(parents=True, exist_ok=True)
                (logs / f"{name}.log").write_text(log, "utf-8")

    def select(field: str) -> set[str]:
        return {name for name, report in reports.items() if report[field]}

    submitted = set(patches)
    completed = select("patch_successfully_applied")
    resolved = select("resolved")
    empty_patch = select("patch_is_None")
    ids = {
        "submitted": submitted,
        "incomplete": instances_by_id.keys() - patches,
        "completed": completed,
        "resolved": resolved,
        "empty_patch": empty_patch,
        "unresolved": completed - resolved,
        "error": submitted - completed - empty_patch,
    }
    report: Record = {"total_instances": len(instances_by_id), "schema_version": 2}
    for key, names in ids.items():
        report[f"{key}_instances"] = len(names)
        report[f"{key}_ids"] = sorted(names)
    report["instances"] = reports
    return report


def _clone(name: str, commit: str, repositories: Path, target: Path) -> None:
    """Check a commit out in a copy of a repository's clone."""
    usual_folder = repositories / name.replace("/", "__")
    folders = [repositories / name, usual_folder, repositories / Path(name).name]
    sources = [folder for folder in folders if folder.is_dir()]
    if not sources:
        message = f"no clone of {name}"
        fix = f"git clone it to {usual_folder}"
        raise MaxlmError(message, where=str(repositories), fix=fix)
    source = sources[0]
    # Linked files would change their owner in the source as well.
    clone = ["git", "clone", "--quiet", "--no-hardlinks", "--no-checkout"]
    clone += [str(source), str(target)]
    checkout = ["git", "-C", str(target), "checkout", "--quiet", "--detach", commit]
    for command in (clone, checkout):
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if process.returncode:
            message = process.stderr.strip().splitlines()[-1]
            raise MaxlmError(message, where=f"{source} at {commit}")
