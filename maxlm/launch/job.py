"""A job: everything that a scheduler's template may print."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.launch.hosts import JobHosts
from maxlm.launch.options import JobOptions, Mount


@dataclass(frozen=True)
class Job:
    """A scheduler's job. Its fields and those of its options are the template's
    variables."""

    scheduler: str
    name: str
    """Name that the scheduler takes: letters, digits, dashes."""
    title: str
    """Title that names the run and its machine, for a reader."""
    hosts: JobHosts
    program: str
    """The verb: ``train``, or ``tune`` or ``rl``, which read Hugging Face checkpoints
    too."""
    config: str
    """A shipped config's name, or a file's path on the hosts."""
    settings: tuple[str, ...]
    config_text: str
    """Text to be written to `config` before; empty: it is there."""
    env: Mapping[str, str]
    secrets: Mapping[str, tuple[str, str]]
    mounts: tuple[Mount, ...]
    node_selector: Mapping[str, str]
    time: str | None
    """D-HH:MM:SS"""
    options: JobOptions

    @property
    def command(self) -> tuple[str, ...]:
        return (self.options.maxlm, self.program, self.config, *self.settings)

    @property
    def script(self) -> str:
        """Returns the command for a shell, which writes the config first if it is not
        there."""
        run = f"exec {shlex.join(self.command)}"
        if not self.config_text:
            return run
        end = f"end of {self.name}"
        write = f"cat > {self.config} <<'{end}' || exit 2"
        return f"{write}\n{self.config_text}{end}\n{run}"
