"""Jobs for stand-ins of `maxlm`, and of schedulers' programs."""

import json
import stat

import pytest

from maxlm.config import load_config
from maxlm.launch.job import make_job
from maxlm.launch.options import JobOptions
from maxlm.launch.render import render_job
from maxlm.run import RunConfig


@pytest.fixture
def program(tmp_path):
    """Writes a program into a folder for the PATH."""

    def write(name, text):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return write


@pytest.fixture
def rendered(tmp_path):
    """A job's text: (scheduler, machine, options of the job)."""

    def make(scheduler, on, run_name=None, force=False, **options):
        source = "llama2_7b"
        settings = ["data.sources=[{store: /shared/tokens}]", "tokenizer.path=/shared/tokenizer"]
        settings += ["folder=/shared/runs"]
        if on.startswith("cpu"):
            source, settings = "demo", ["model.num_layers=1", f"folder={tmp_path}"]
        settings += [f"name={json.dumps(run_name)}"] if run_name else []
        run = load_config(RunConfig, source, settings).value
        job, _ = make_job(
            *(run, source, settings),
            scheduler=scheduler,
            on=on,
            options=JobOptions(**options),
            force=force,
        )
        return render_job(job)

    return make
