"""Settings of a run's length, its regular interruptions, and what it does when things
go wrong."""

from pydantic import Field

from maxlm.config import Config, LocalPath


class DownstreamConfig(Config):
    """Evaluation on tasks of lm-evaluation-harness while a run trains; see
    docs/evaluation.md."""

    tasks: tuple[str, ...] = ()
    """Names of the harness's tasks, such as arc_easy."""
    every: int = Field(default=0, ge=0)
    """Steps between such evaluations; 0: only at the end."""
    limit: int | None = Field(default=200, gt=0)
    """Rows of each task at most; null: all."""
    shots: int | None = Field(default=None, ge=0)
    """Examples before each question; null: as each task says."""
    data: LocalPath | None = None
    """Folder with files of the tasks' rows; null: the harness's own loaders."""
    position_documents: int = Field(default=0, ge=0)
    """Held-out documents of at least `data.seq_len` tokens on which the loss is
    measured by position: how much a longer context helps; 0: none."""


class TrainConfig(Config):
    steps: int = Field(default=1000, gt=0)
    """Optimizer updates in the whole run."""
    micro_batches: int = Field(default=1, gt=0)
    """Parts a batch is taken in, one after the other: activation memory falls by as
    much, the result stays the same."""
    max_device_rows: int | None = Field(default=None, ge=1)
    """Most sequences that a device takes at once: on a machine with fewer devices a
    batch is taken in more parts, and the batch stays what it was. With it,
    micro_batches follows from the mesh; null: micro_batches says."""
    start_from: LocalPath | None = None
    """A run's folder, such as `maxlm convert` makes, whose parameters (and tokenizer,
    if none is named) this run starts from; null: from random ones. The optimizer starts
    anew."""
    trainable: tuple[str, ...] | None = None
    """Patterns of the names of parameters that are trained, such as
    `layers.attention.*` or `*.bias`; the others stay as they are, without gradients and
    optimizer state. `*` stands for any text. null: all, or with an adapter those that
    it adds and the model's `heads`."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the parameters with this decay (4 bytes a
    parameter) and evaluate with it; null: none. It has all parameters, also those that
    are not trained."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out text; 0: only at the end."""
    eval_batches: int | None = Field(default=16, gt=0)
    """Batches of each source that one such evaluation reads, the first ones every time,
    so that the points of a curve can be compared; null: all. The end adds a figure of
    all held-out text (`final_eval_loss`), which is no point of that curve."""
    downstream: DownstreamConfig = DownstreamConfig()


class FaultToleranceConfig(Config):
    """Handling of non-finite updates, loss spikes, hanging steps and lost processes."""

    max_skipped: int = Field(default=3, ge=1)
    """An update with a loss or gradient that is not finite is left out; after so many
    in a row the run goes back to a checkpoint and leaves out the batches since."""
    spike_threshold: float | None = Field(default=15.0, gt=0)
    """A loss is a spike if it exceeds the median of those before by this many standard
    deviations, estimated from the median deviation (1.4826 times it, and 0.5% of the
    median at least); null: no loss is."""
    spike_steps: int = Field(default=3, ge=1)
    """Spikes in a row after which the run goes back, as with `max_skipped`."""
    spike_window: int = Field(default=128, ge=8)
    """Number of losses before that are looked at; until there are so many, none is a
    spike."""
    max_rollbacks: int = Field(default=5, ge=0)
    """Times that a run goes back in its whole life before it gives up."""
    hang_factor: float = Field(default=50.0, gt=1)
    """A step that takes this many times the median is a hang: every process writes down
    what each of its threads is doing, and ends."""
    hang_seconds: float = Field(default=300.0, gt=0)
    """Least seconds that a step may take before it is a hang."""
    idle_seconds: float = Field(default=3600.0, gt=0)
    """Seconds for work without a median: the first step, which compiles, an evaluation,
    a save."""
    join_seconds: float = Field(default=300.0, gt=0)
    """Seconds that processes wait for each other at the start."""
    peer_seconds: float = Field(default=60.0, ge=10)
    """Seconds that a process may be silent before the others take it for dead, and
    end."""
