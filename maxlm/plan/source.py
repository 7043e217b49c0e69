"""Plans of runs from a file, a run's folder or a config."""

import json
import shlex
from pathlib import Path

from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.plan.diff import StoredPlan
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.run.load_config import load_run_config
from maxlm.sharding import count_min_devices, mesh_sizes


def load_plan(source: str, machine: Machine | None) -> StoredPlan:
    """Loads or computes a plan. Raises MaxlmError: there is none, or the config has a
    mistake.

    Args:
        source: a JSON file that ``maxlm plan --json`` printed; a run's folder, whose
            plan.json was written for the machine that it trained on; or a config, with
            settings after it as on a command line: ``llama3_8b model.remat=mlp``.
        machine: what a config is planned on; None: bytes alone, on the smallest mesh
            there is.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "plan.json"
    if path.suffix == ".json":
        return _read_plan(path)
    if path.is_file():
        # A config's path may have spaces.
        words = [source]
    else:
        words = shlex.split(source) or [source]
    config, *settings = words
    run = load_run_config(config, settings)
    sizes = None
    if machine is None:
        sizes = mesh_sizes(run.mesh, count_min_devices(run.mesh))
    plan = plan_run(run, machine, sizes=sizes)
    return StoredPlan.model_validate(plan.to_json())


def _read_plan(path: Path) -> StoredPlan:
    try:
        return StoredPlan.model_validate(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise MaxlmError(f"cannot be read: {error.strerror}", where=str(path)) from None
    # Not UTF-8, no JSON, or another JSON.
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError):
        fix = "write one with maxlm plan CONFIG --json"
        raise MaxlmError("is no plan of a run", where=str(path), fix=fix) from None
