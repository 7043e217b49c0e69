"""From a run and a machine to a scheduler's job: checked, rendered from a template, submitted."""

from maxlm.launch.job import Job, make_job
from maxlm.launch.options import SCHEDULERS, Options, check_scheduler
from maxlm.launch.render import render
from maxlm.launch.submit import job_file, keep, submit

__all__ = [
    "SCHEDULERS",
    "Job",
    "Options",
    "check_scheduler",
    "job_file",
    "keep",
    "make_job",
    "render",
    "submit",
]
