"""RunConfig: the one typed description of a run, composed of each part's own config."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator, model_validator

from maxlm.adapters import AdapterConfig
from maxlm.checkpoint.config import CheckpointConfig
from maxlm.config import Config, FileName, LocalPath, MaxlmError
from maxlm.config.load import load_config
from maxlm.config.sampling import FinalSamplesConfig
from maxlm.data.batch_source import BatchArraySpec
from maxlm.data.config import DataConfig
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.models.adapters import count_virtual_tokens
from maxlm.models.architectures import ModelConfig
from maxlm.models.context_extension import ContextExtensionConfig, extend_context
from maxlm.models.dtypes import ComputeDtype
from maxlm.models.transforms import ParamTransform
from maxlm.optim.config import AnyOptimizerConfig, OptimizerConfig
from maxlm.optim.schedule import ScheduleConfig
from maxlm.parallel.config import ParallelConfig
from maxlm.quantization.config import QuantizationConfig
from maxlm.run.model_placement import check_latent_split
from maxlm.run.reporting_config import ReportingConfig
from maxlm.run.train_config import FaultToleranceConfig, TrainConfig
from maxlm.sharding import MeshConfig, ShardingConfig
from maxlm.tasks import ClmTask, TaskConfig, check_task
from maxlm.tasks.task import list_batch_arrays

# A checkpoint can be gone on from only while these are what they were: they decide the
# parameters' shapes, the batches, or the meaning of the optimizer's state.
IDENTITY = (
    "seed",
    "model",
    "adapter",
    "quantization",
    "tokenizer",
    "data",
    "task",
    "optimizer",
    "train.ema_decay",
)
# ... but for these, which change how fast batches come and not which, what happens where
# something fails, and what is tried beside training.
INCIDENTAL = (
    "model.remat",
    "data.workers",
    "data.prefetch",
    "data.verify",
    "data.build_workers",
    "data.sources.*.store_segments",  # what a store then holds is compared
    "task.validation",  # it may be null
    "task.validation.*",
    "task.generation_mesh",
    "task.generation_mesh.*",
    "task.rollouts.environment_errors",
    "task.rollouts.keep_records",
    "task.rollouts.reply_seconds",
    "task.rollouts.reply_threads",
    "task.rewards.*.time_limit",
    "task.rewards.*.on_timeout",
    "task.rewards.*.on_error",
    "task.rewards.*.num_programs",
    "task.rewards.*.num_requests",
    "task.rewards.*.max_retries",
    "task.rewards.*.mesh",
    "task.rewards.*.mesh.*",
    "task.rewards.*.address",  # where a judge is
    "task.rewards.*.key_variable",
)
# What the tokenizer and the token stores in a run's folder were made with.
PREPARED = ("tokenizer", "data.sources", "data.heldout_fraction")
# ... but for these, which say how a source is read, and not what is prepared of it.
READING = tuple(
    f"data.sources.*.{name}" for name in ("weight", "max_epochs", "store_segments")
)


class RunConfig(Config):
    """A run: what is trained, on what, how, and where it is kept."""

    name: FileName = "run"
    """Name of the run, whose folder is FOLDER/NAME."""
    folder: LocalPath = "runs"
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random: parameters, data order, sampling."""
    compilation_cache: LocalPath | None = "~/.cache/maxlm/xla"
    """Folder of compiled programs: the second start of a run skips most of its
    compilation; null: compile anew each time."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the maths: auto is bfloat16 on TPUs and GPUs, float32 on CPUs.
    Parameters, norms, softmax, loss and optimizer are float32 in any case."""
    tune: ContextExtensionConfig = ContextExtensionConfig()
    model: ModelConfig
    adapter: AdapterConfig | None = None
    """Small parameters beside the model's own, by kind, which alone are trained unless
    `train.trainable` says otherwise; an installed package may register others. null:
    none."""
    quantization: QuantizationConfig | None = None
    """Number formats that matrices are stored in, which are not trained then: those
    below an adapter, or of a model to use. null: none."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    parallel: ParallelConfig = ParallelConfig()
    task: TaskConfig = ClmTask()
    optimizer: AnyOptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultToleranceConfig = FaultToleranceConfig()
    reporting: ReportingConfig = ReportingConfig()
    samples: FinalSamplesConfig = FinalSamplesConfig()

    @field_validator("model")
    @classmethod
    def _extend_context(cls, model: ModelConfig, info: ValidationInfo) -> ModelConfig:
        return extend_context(model, info.data.get("tune", ContextExtensionConfig()))

    @field_validator("data")
    @classmethod
    def _extend_rows(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        length = info.data.get("tune", ContextExtensionConfig()).extend_to
        if length is None or "seq_len" in data.model_fields_set:
            return data
        return data.model_copy(update={"seq_len": length})

    @model_validator(mode="after")
    def _check_parts(self):
        check_task(self.task, self.model, self.data.seq_len, self.num_virtual_tokens)
        check_latent_split(self.model, self.sharding.compute)
        check_samples(self.samples, self.model)
        batch, micro = self.data.batch_size, self.train.micro_batches
        if self.train.max_device_rows is None and batch % micro:
            raise MaxlmError(
                f"data.batch_size={batch} does not divide into "
                f"train.micro_batches={micro}",
                fix="make the batch a multiple of the micro-batches",
            )
        return self

    @property
    def batch_arrays(self) -> dict[str, BatchArraySpec]:
        """The arrays of a batch's rows by name."""
        seq_len = self.data.seq_len
        arrays = list_batch_arrays(self.task, self.model.frontend, seq_len)
        return arrays | self.task.list_model_arrays(self.model, seq_len)

    @property
    def transforms(self) -> tuple[ParamTransform, ...]:
        """How parameters are stored: quantized, then adapted."""
        transforms = (self.quantization, self.adapter)
        return tuple(transform for transform in transforms if transform is not None)

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens that every example begins with."""
        return count_virtual_tokens(self.adapter)


def check_samples(
    samples: FinalSamplesConfig, model: ModelConfig, prompt_lengths: Sequence[int] = ()
) -> None:
    """Check that a model continues text, and has positions for prompts and their
    continuations. ``prompt_lengths``: tokens of each prompt; 1 where there is no
    tokenizer yet. Raises MaxlmError, naming the prompt."""
    if samples.prompts and model.transformer_type == "encoder":
        message = "an encoder names masked tokens, and continues no text"
        raise MaxlmError(message, where="samples.prompts", fix="set it to []")
    max_new_tokens = samples.max_new_tokens
    # A model without a table of positions can continue past its training length, but
    # memory bounds the keys and values that it keeps of a row.
    limit = model.position_limit or max(4096, 16 * model.max_seq_len)
    for index, prompt_length in enumerate(prompt_lengths):
        total = prompt_length + max_new_tokens
        if model.transformer_type == "encoder_decoder":
            # The encoder holds the prompt; the decoder holds start_id and the output.
            total = max(prompt_length, 1 + max_new_tokens)
        if total > limit:
            raise MaxlmError(
                f"the prompt and samples.max_new_tokens={max_new_tokens} make "
                f"{total:,} tokens; model.max_seq_len={model.max_seq_len} allows "
                f"{limit:,}",
                where=f"samples.prompts.{index}",
                fix="shorten the prompt, or ask for fewer new tokens",
            )


def read_frozen_configs(
    config: RunConfig, sources: Mapping[str, str | None] | None = None
) -> dict[str, RunConfig]:
    """Return the runs whose models a task only reads, by name; ``sources``: default,
    the task's."""
    sources = config.task.frozen_models() if sources is None else sources
    bases = list_base_models(config, sources)

    frozen_runs: dict[str, RunConfig] = {}
    for name, folder in sources.items():
        if folder is not None:
            run = load_config(RunConfig, Path(folder) / "config.yaml").value
        elif name in bases:
            run = config.model_copy(update={"adapter": None})
        else:
            run = config
        frozen_runs[name] = run
    models = {name: run.model for name, run in frozen_runs.items()}
    config.task.check_frozen_models(config.model, models)
    return frozen_runs


def check_quantized_is_adapted(config: RunConfig) -> None:
    """Check that a run that trains has something to train beside quantized matrices.
    Raises MaxlmError."""
    is_adapted = config.adapter is not None or config.train.trainable is not None
    if config.quantization is not None and not is_adapted:
        message = "quantized matrices are not trained, and there is no adapter"
        fix = "set adapter (such as adapter.kind=lora), or quantization=null"
        raise MaxlmError(message, where="quantization", fix=fix)


def read_auxiliary_configs(config: RunConfig) -> dict[str, ModelConfig]:
    """Return the models that a task trains beside the run's own, by name. Raises
    MaxlmError: one has another vocabulary."""
    models: dict[str, ModelConfig] = {}
    for name, auxiliary in config.task.auxiliary_models().items():
        model = config.model
        if auxiliary.source is not None:
            path = Path(auxiliary.source) / "config.yaml"
            model = load_config(RunConfig, path).value.model
        vocab_size = config.model.vocab_size
        if model.vocab_size != vocab_size or model.max_seq_len < config.data.seq_len:
            message = f"the {name} model has {model.vocab_size} ids and reads "
            message += f"{model.max_seq_len} tokens, the run has {vocab_size} ids and "
            message += f"rows of {config.data.seq_len}"
            fix = "use a run with the same vocabulary, and rows no longer than it reads"
            raise MaxlmError(message, where=auxiliary.source or "task", fix=fix)
        models[name] = model.model_copy(update={"heads": dict(auxiliary.heads)})
    return models


def list_base_models(
    config: RunConfig, sources: Mapping[str, str | None] | None = None
) -> frozenset[str]:
    """Return the names of those models of a task that are the base of the run's own
    adapter, and so need no parameters of their own: the models that training starts
    from, where these have no adapter and the base never changes. ``sources``: default,
    those of the task."""
    sources = config.task.frozen_models() if sources is None else sources
    adapter = config.adapter
    start = config.train.start_from
    if adapter is None or adapter.changes_base or config.train.trainable is not None:
        return frozenset()
    if start is not None:
        path = Path(start) / "config.yaml"
        if not Path(start).exists():
            return frozenset()  # it may have had an adapter
        if path.exists() and load_config(RunConfig, path).value.adapter is not None:
            return frozenset()
    return frozenset(name for name, folder in sources.items() if folder is None)


def resolve_micro_batches(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """Return the config on a mesh: where ``train.max_device_rows`` is set,
    ``micro_batches`` is the fewest parts of the batch that leave every device no more
    sequences at once."""
    max_rows = config.train.max_device_rows
    if max_rows is None:
        return config
    batch_size = config.data.batch_size
    stages = sizes["stage"]
    num_shards = prod(sizes[axis] for axis in config.sharding.compute.batch)
    rows = batch_size // num_shards
    # A pipeline takes a multiple of its stages.
    candidates = [
        micro_batches
        for micro_batches in range(stages, rows + 1, stages)
        if rows % micro_batches == 0 and rows // micro_batches <= max_rows
    ]
    if batch_size % num_shards or not candidates:
        split = f"{num_shards} devices"
        if stages > 1:
            split += f" and {stages} stages"
        raise MaxlmError(
            f"a batch of {batch_size} sequences does not divide over {split} into "
            f"parts of {max_rows} or less",
            where="train.max_device_rows",
            fix="use a mesh whose batch axes and stages divide the batch",
        )
    train = config.train.model_copy(update={"micro_batches": candidates[0]})
    return config.model_copy(update={"train": train})
