"""RunConfig: the one typed description of a run, composed of each part's own config."""

from collections.abc import Mapping, Sequence
from math import prod

from pydantic import Field, model_validator

from maxlm.config import Config, FileName, LocalPath, MaxlmError
from maxlm.data.config import DataConfig
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.inference.sampling import SamplingConfig
from maxlm.models.architectures import ModelConfig
from maxlm.models.dtypes import ComputeDtype
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import MeshConfig, ShardingConfig
from maxlm.tasks import (
    ARCHITECTURES,
    ClmConfig,
    ObjectiveConfig,
    batch_arrays,
    marks_needed,
)
from maxlm.train.config import CheckpointConfig, FaultsConfig, TrainConfig
from maxlm.train.optimizer import OptimizerConfig
from maxlm.train.reporting import ReportingConfig
from maxlm.train.schedule import ScheduleConfig

# A checkpoint can be gone on from only while these are what they were: they decide the parameters'
# shapes, the batches, or the meaning of the optimizer's state.
IDENTITY = ("seed", "model", "tokenizer", "data", "objective", "optimizer", "train.ema_decay")
# ... but for these, which change how fast batches come and not which.
INCIDENTAL = ("model.remat", "data.workers", "data.prefetch", "data.build_workers")
# What the tokenizer and the token stores in a run's folder were made with.
PREPARED = ("tokenizer", "data.sources", "data.heldout_fraction")


class SamplesConfig(SamplingConfig):
    """Text generated when training ends."""

    prompts: tuple[str, ...] = ()


class RunConfig(Config):
    """A run: what is trained, on what, how, and where it is kept."""

    name: FileName = "run"
    """Its folder is FOLDER/NAME."""
    folder: LocalPath = "runs"
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything random: parameters, data order, sampling."""
    compilation_cache: LocalPath | None = "~/.cache/maxlm/xla"
    """Folder of compiled programs: the second start of a run skips most of its compilation; null:
    compile anew each time."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the maths: auto is bfloat16 on TPUs and GPUs, float32 on CPUs. Parameters, norms,
    softmax, loss and optimizer are float32 in any case."""
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    parallel: ParallelConfig = ParallelConfig()
    objective: ObjectiveConfig = ClmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    reporting: ReportingConfig = ReportingConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _parts_agree(self):
        check_parts(self)
        return self


def check_parts(config: RunConfig) -> None:
    """Everything that two parts of a run must agree on, whatever the machine.

    Raises:
        MaxlmError: naming both settings.
    """
    model, data, train, objective = config.model, config.data, config.train, config.objective
    wanted = ARCHITECTURES[objective.kind]
    if model.architecture != wanted:
        fits = [kind for kind, one in ARCHITECTURES.items() if one == model.architecture]
        raise MaxlmError(
            f"objective.kind={objective.kind} trains a model of architecture {wanted}, "
            f"model.architecture={model.architecture}",
            fix=f"use objective.kind={' or '.join(fits)}",
        )
    if model.attention.latent is not None and config.sharding.compute.latent:
        raise MaxlmError(
            "latent attention needs its narrow vectors whole",
            where="sharding.compute.latent",
            fix="set it to null (sharding.storage.latent splits weights at rest)",
        )
    longest = max(length for length, _ in batch_arrays(objective, data.seq_len).values())
    if longest > model.max_seq_len:
        rows = "" if longest == data.seq_len else f" (rows of {longest} with the marks)"
        raise MaxlmError(
            f"data.seq_len={data.seq_len}{rows} is longer than "
            f"model.max_seq_len={model.max_seq_len}",
            fix="shorten the sequences, or raise the model's limit",
        )
    objective.check(data.seq_len, model.vocab_size)
    if config.samples.prompts and model.architecture == "encoder":
        raise MaxlmError(
            "an encoder names masked tokens, and continues no text",
            where="samples.prompts",
            fix="set it to []",
        )
    if train.max_device_rows is None and data.batch_size % train.micro_batches:
        raise MaxlmError(
            f"data.batch_size={data.batch_size} does not divide into "
            f"train.micro_batches={train.micro_batches}",
            fix="make the batch a multiple of the micro-batches",
        )


def fitted(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """The config on a mesh: where ``train.max_device_rows`` is set, ``train.micro_batches`` is the
    fewest parts of the batch that leave every device no more sequences at once.

    Args:
        sizes: mesh axis → devices.

    Raises:
        MaxlmError: the batch does not divide over the mesh.
    """
    most = config.train.max_device_rows
    if most is None:
        return config
    ways, stages = prod(sizes[axis] for axis in config.sharding.compute.batch), sizes["stage"]
    rows = config.data.batch_size // ways
    divides = config.data.batch_size % ways == 0
    parts = [n for n in range(stages, rows + 1, stages) if rows % n == 0 and rows // n <= most]
    if not divides or not parts:
        split = f"{ways} devices" + (f" and {stages} stages" if stages > 1 else "")
        raise MaxlmError(
            f"a batch of {config.data.batch_size} sequences does not divide over {split} into "
            f"parts of {most} or less",
            where="train.max_device_rows",
            fix="use a mesh whose batch axes and stages divide the batch",
        )
    train = config.train.model_copy(update={"micro_batches": parts[0]})
    return config.model_copy(update={"train": train})


def check_batch(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Check that a micro-batch divides over the devices it is split over: rows and sequence.

    Args:
        sizes: mesh axis → devices.

    Raises:
        MaxlmError: naming the sizes.
    """
    axes = config.sharding.compute.batch
    ways = prod(sizes[axis] for axis in axes)
    rows = config.data.batch_size // config.train.micro_batches
    if rows % ways:
        split = "·".join(f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        raise MaxlmError(
            f"a micro-batch of {rows} sequences does not divide over {split}",
            where="data.batch_size",
            fix=f"use a batch_size that is a multiple of {ways * config.train.micro_batches}, "
            "or a smaller mesh",
        )
    for name in ("seq", "residual"):
        split_over = [axis for axis in getattr(config.sharding.compute, name) if sizes[axis] > 1]
        ways = prod(sizes[axis] for axis in split_over)
        arrays = batch_arrays(config.objective, config.data.seq_len)
        for array, (length, _) in arrays.items():
            if length % ways:
                split = "·".join(f"{axis}={sizes[axis]}" for axis in split_over)
                where, what = "data.seq_len", "seq_len"
                if length != config.data.seq_len:
                    what = "encoder_len" if array.startswith("input_") else "decoder_len"
                    where = f"objective.{what}"
                raise MaxlmError(
                    f"a sequence of {length} tokens does not divide over {split} "
                    f"(sharding.compute.{name})",
                    where=where,
                    fix=f"use a {what} that is a multiple of {ways}, or a smaller mesh",
                )


def check_stages(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Check that micro-batches fill a pipeline, and that its settings mean something.

    Args:
        sizes: mesh axis → devices.

    Raises:
        MaxlmError: naming the sizes.
    """
    stages, micro = sizes["stage"], config.train.micro_batches
    parallel = config.parallel
    if stages == 1:
        return
    if config.sharding.compute.layers != ("stage",) or config.sharding.storage.layers != ("stage",):
        raise MaxlmError(
            f"mesh.stage={stages}, but layers are not split over it",
            where="sharding.storage.layers, sharding.compute.layers",
            fix="set both to stage, or mesh.stage=1",
        )
    if micro % stages:
        few = "less than" if micro < stages else "not a multiple of"
        fewer = f"a divisor of {micro}" if micro > 1 else "1"
        raise MaxlmError(
            f"{micro} is {few} the {stages} pipeline stages",
            where="train.micro_batches",
            fix=f"set it to {-(-micro // stages) * stages}, or mesh.stage to {fewer}",
        )
    if parallel.layer_groups > 1 and parallel.schedule != "circular":
        raise MaxlmError(
            f"{parallel.layer_groups} layer groups have no place in a {parallel.schedule} pipeline",
            where="parallel.layer_groups",
            fix="set it to 1, or parallel.schedule=circular",
        )
    if why := no_pipeline(config.model):
        raise MaxlmError(
            f"{stages} stages have equal shares of one row of layers, but {why}",
            where="mesh.stage",
            fix="set it to 1 and give its devices to data, fsdp or tensor",
        )
    layers, groups = config.model.num_layers, parallel.layer_groups
    period = len(config.model.kinds)
    if layers % (stages * groups * period):
        of, or_groups, whole = "", "", ""
        if groups > 1:
            of, or_groups = f" of {groups} layer groups", " or layer groups"
        if period > 1:
            whole = f" in whole patterns of {period}"
        raise MaxlmError(
            f"{layers} layers do not divide over {stages} pipeline stages{of}{whole}",
            where="model.num_layers",
            fix=f"use a multiple of {stages * groups * period}, or fewer stages{or_groups}",
        )


def no_pipeline(model: ModelConfig) -> str | None:
    """Why a model's layers cannot lie on pipeline stages; None: they can, if their number
    divides."""
    if len(model.trunks) > 1:
        return "this is an encoder beside a decoder"
    if model.architecture == "encoder":
        return "this is an encoder, whose head's own layer is behind them"
    if model.dense_layers:
        return f"the first model.dense_layers={model.dense_layers} are unlike the others"
    if model.positions.kind == "relative":
        return "all of these share the table of model.positions.kind=relative"
    return None


def check_crossing(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Check that a decoder's tokens have an encoder's whole output at hand.

    Args:
        sizes: mesh axis → devices.

    Raises:
        MaxlmError: naming the sizes.
    """
    split = [axis for axis in config.sharding.compute.seq if sizes[axis] > 1]
    if split and any(trunk.cross_attention for trunk in config.model.trunks):
        raise MaxlmError(
            f"cross-attention looks at whole sequences, which {split[0]}={sizes[split[0]]} splits",
            where=f"mesh.{split[0]}",
            fix="set it to 1, or sharding.compute.seq and residual to null",
        )


def check_experts(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Check that experts can be split as asked.

    Args:
        sizes: mesh axis → devices.

    Raises:
        MaxlmError: naming the sizes.
    """
    moe, compute = config.model.moe, config.sharding.compute
    if moe is None:
        if sizes["expert"] > 1:
            raise MaxlmError(
                f"expert={sizes['expert']}, but the model has no experts",
                where="mesh.expert",
                fix="set it to 1 and give its devices to data, fsdp or tensor",
            )
        return
    tokens = compute.batch + compute.seq
    for axis in compute.expert:
        if sizes[axis] > 1 and axis not in tokens:
            raise MaxlmError(
                f"experts are split over '{axis}', the tokens they serve are not",
                where="sharding.compute.expert",
                fix=f"add {axis} to sharding.compute.batch, or take it from this rule",
            )
    split = [axis for axis in compute.seq if sizes[axis] > 1]
    if moe.dispatch == "capacity" and split:
        raise MaxlmError(
            f"an expert's capacity is counted in whole sequences, which {split[0]}="
            f"{sizes[split[0]]} splits",
            where="model.moe.dispatch",
            fix="use dispatch=dropless, or mesh.context=1",
        )


def vocab_fits(config: RunConfig, tokenizer_vocab: int) -> None:
    """Check that every id of the tokenizer has a row in the model's table, and that there are as
    many more as the objective's marks take.

    Raises:
        MaxlmError: naming both sizes.
    """
    marks = marks_needed(config.objective)
    if marks and tokenizer_vocab + marks > config.model.vocab_size:
        raise MaxlmError(
            f"the tokenizer has {tokenizer_vocab} ids and objective.kind={config.objective.kind} "
            f"needs {marks} more, model.vocab_size={config.model.vocab_size}",
            where="model.vocab_size",
            fix=f"set it to {tokenizer_vocab + marks} or more, or name ids of the tokenizer's own "
            "in the objective",
        )
    if tokenizer_vocab > config.model.vocab_size:
        raise MaxlmError(
            f"the tokenizer has {tokenizer_vocab} ids, model.vocab_size={config.model.vocab_size}",
            where="model.vocab_size",
            fix=f"set it to {tokenizer_vocab} or more, or train a smaller tokenizer",
        )


def check_samples(config: RunConfig, prompt_tokens: Sequence[int]) -> None:
    """Check that the model has positions for ``samples.prompts`` and their continuations.

    Args:
        prompt_tokens: tokens of each prompt; 1 where there is no tokenizer yet.

    Raises:
        MaxlmError: naming the prompt.
    """
    new, length = config.samples.max_new_tokens, config.model.max_seq_len
    # Without a table of positions a model can go on, but what it keeps of a row fills the memory.
    limit = config.model.position_limit or max(4096, 16 * length)
    for index, tokens in enumerate(prompt_tokens):
        total = tokens + new
        if config.model.architecture == "encoder_decoder":  # they stand apart, behind start_id
            total = max(tokens, 1 + new)
        if total > limit:
            raise MaxlmError(
                f"the prompt and samples.max_new_tokens={new} make {total:,} tokens; "
                f"model.max_seq_len={length} allows {limit:,}",
                where=f"samples.prompts.{index}",
                fix="shorten the prompt, or ask for fewer new tokens",
            )
