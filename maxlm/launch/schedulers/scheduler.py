"""What a job needs to know of its scheduler."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import ClassVar

from maxlm.config import MaxlmError
from maxlm.config.assets import find_asset
from maxlm.launch.job import Job
from maxlm.launch.options import JobOptions, Mount, is_variable_name, split_mount

# The environment's variables and the program: every scheduler's job has them.
_COMMON_OPTIONS = ("env", "maxlm")
# Option → what to do instead on a scheduler that does not take it.
_FIXES = {
    "image": "install maxlm on its hosts, and name it by --maxlm if it is not on their "
    "PATH",
    "secret": "set the variable on its hosts",
    "mount": "mount it on its hosts",
    "spot": "ask for such machines where they are made",
}


class JobScheduler(ABC):
    """One scheduler: the machines and options of its jobs, their template, and the
    commands that submit them. Subclasses set the class variables and override what
    differs."""

    name: ClassVar[str]
    """Name that ``maxlm launch`` takes and messages print."""
    template: str | Path
    """Jinja2 template of a job, named after the job's file, with ``.j2`` behind: under
    the shipped ``launch/`` (a string), or a file of another package (a path)."""
    platforms: ClassVar[tuple[str, ...]]
    """Kinds of machines that the template is written for, of tpu, gpu and cpu."""
    options: ClassVar[frozenset[str]]
    """Fields of :class:`JobOptions` that a job takes, beside ``env`` and ``maxlm``,
    which all jobs take."""
    fixes: ClassVar[Mapping[str, str]] = {}
    """For an option that a job does not take: what to do instead."""
    starts_several_slices: ClassVar[bool] = False
    """Whether a job can have several slices of a TPU."""
    shares_files: ClassVar[bool] = False
    """Whether hosts see the files of the machine that a job is submitted from."""
    always_in_container: ClassVar[bool] = False
    """Whether a job's processes run in a container also where no image is named."""
    mountable: ClassVar[str] = "gs:// and s3://"
    """Sources that :meth:`can_mount` accepts, in words."""

    @abstractmethod
    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        """Returns the commands that submit a job's file, in order."""

    def takes_option(self, option: str) -> bool:
        """Returns whether a job takes a field of :class:`JobOptions`."""
        return option in _COMMON_OPTIONS or option in self.options

    def find_fix(self, option: str) -> str | None:
        """Returns what to do instead of an option that a job does not take; None:
        leave it out."""
        return self.fixes.get(option) or _FIXES.get(option)

    def check_options(self, options: JobOptions) -> None:
        """Checks options that a job takes against each other. Raises MaxlmError."""
        del options

    def list_notes(self, options: JobOptions) -> list[str]:
        """Returns what a user should know of a job with these options, a line each."""
        del options
        return []

    def runs_in_container(self, options: JobOptions) -> bool:
        """Returns whether a job's processes see only what is mounted into their
        container."""
        return self.always_in_container or bool(options.image)

    def sees_submitting_machine(self, options: JobOptions) -> bool:
        """Returns whether a job's processes see the files of the machine that it is
        submitted from."""
        return self.shares_files and not self.runs_in_container(options)

    def can_mount(self, mount: Mount) -> bool:
        """Returns whether a job can mount the source of a mount."""
        return bool(mount.bucket)

    def suggest_mount(self, folder: PurePosixPath) -> str:
        """Returns a mount, ``SOURCE:PATH``, that shows a user how to mount a folder."""
        return f"gs://bucket:{folder}"

    def parse_mounts(self, pairs: Sequence[str]) -> tuple[Mount, ...]:
        """Parses mounts, ``SOURCE:PATH`` each, of sources that a job can mount."""
        mounts = []
        for pair in pairs:
            mount = split_mount(pair)
            if not self.can_mount(mount):
                message = f"{self.name} cannot mount {mount.source}"
                raise MaxlmError(message, fix=f"use {self.mountable}")
            mounts.append(mount)
        return tuple(mounts)

    def parse_secret(self, pair: str) -> tuple[str, tuple[str, str]]:
        """Parses a secret variable: its name, and the Kubernetes secret and the key
        that hold it, which are empty where it is read from the environment."""
        name, equals, _ = pair.partition("=")
        if equals or not is_variable_name(name):
            message = f"--secret {name}: {self.name} takes the variable's name alone"
            fix = f"set {name} in the environment you submit from, and write "
            fix += f"--secret {name}"
            raise MaxlmError(message, fix=fix)
        return name, ("", "")

    def find_template(self) -> Path:
        """Returns the template's file."""
        if isinstance(self.template, Path):
            return self.template
        return find_asset(f"launch/{self.template}")

    @property
    def template_label(self) -> str:
        """The template's file for messages."""
        if isinstance(self.template, Path):
            return str(self.template)
        return f"the shipped launch/{self.template}"

    @property
    def file_name(self) -> str:
        """Name of a job's file."""
        return PurePath(self.template).name.removesuffix(".j2")
