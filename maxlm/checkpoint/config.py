"""Settings of when and where checkpoints are written, and which are kept."""

from pydantic import Field

from maxlm.config import Config, LocalPath


class CheckpointConfig(Config):
    """Times and places of checkpoints, and which are kept."""

    every_steps: int = Field(default=500, ge=0)
    """Steps between checkpoints; 0: only where the run stops."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes after which another is due; null: by steps alone."""
    keep_last: int = Field(default=2, ge=1)
    """Number of the newest that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this many steps are kept for good too; null: none."""
    asynchronous: bool = True
    """true: training goes on while files are written, for one more copy of the state in
    host memory. false: it waits for them."""
    local_folder: LocalPath | None = None
    """A fast disk of each host's own (or its memory: /dev/shm/maxlm) for the two newest
    of checkpoints in between, which outlive the job and not the host; null: none."""
    local_every_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints in ``local_folder``."""
    remote_folder: str | None = None
    """A place (gs://, s3://, a path) to which process 0 copies each checkpoint once it
    is complete, and from which a run goes on whose own folder has no newer one; null:
    none."""
