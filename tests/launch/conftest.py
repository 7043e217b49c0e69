"""Jobs for stand-ins of `maxlm`, and of schedulers' programs."""

import stat

import pytest

from maxlm.config.load import load_config
from maxlm.launch.make_job import make_job
from maxlm.launch.options import JobOptions
from maxlm.launch.render import render_job
from maxlm.run.config import RunConfig

DEFAULT_OPTIONS = JobOptions()


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
def rendered():
    """A job's text: (scheduler, machine, settings of the run, options of the job,
    whether to make it though it does not fit)."""

    def make(scheduler, on, more=(), options=DEFAULT_OPTIONS, force=False):
        if on.startswith("cpu"):
            source = "demo"
            settings = ["model.num_layers=1"]
        else:
            source = "llama2_7b"
            settings = [
                "data.sources=[{store: /data/tokens}]",
                "tokenizer.path=/data/tokenizer",
            ]
        settings += ["folder=/data/runs", *more]
        run = load_config(RunConfig, source, settings).value
        job, _ = make_job(
            run,
            source,
            settings,
            scheduler=scheduler,
            on=on,
            options=options,
            force=force,
        )
        return render_job(job)

    return make
