"""A finished (or still growing) run, opened for use."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from maxlm.config import MaxlmError, load_config
from maxlm.data.tokenizer import Tokenizer, load_tokenizer
from maxlm.models.architectures import Model
from maxlm.models.params import Params
from maxlm.programs.setup import set_up
from maxlm.run import RunConfig
from maxlm.sharding import MeshConfig
from maxlm.train.checkpoint import FolderTier, group_sizes


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it."""

    config: RunConfig
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int


def load_run(
    folder: str | Path, *, step: int | None = None, mesh: MeshConfig | None = None
) -> LoadedRun:
    """The parameters of a run's checkpoint (default: the newest), whatever mesh wrote them.

    Args:
        mesh: where to put them; default: one device.

    Raises:
        MaxlmError: no run there, no such checkpoint, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        raise MaxlmError(
            "no run here (no config.yaml)", where=str(folder), fix="name a folder like runs/demo"
        )
    config = load_config(RunConfig, folder / "config.yaml").value
    config = config.model_copy(update={"mesh": mesh or MeshConfig()})
    setup = set_up(config, None if mesh else jax.local_devices()[:1], for_training=False)
    average = config.train.ema_decay is not None
    with FolderTier(
        folder / "checkpoints", read_only=True, grouped=group_sizes(setup.specs)
    ) as checkpoints:
        step = checkpoints.latest() if step is None else step
        abstract = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            setup.specs,
            setup.shardings.params,
        )
        params = checkpoints.restore_params(step, abstract, name="ema" if average else "params")
    tokenizer = load_tokenizer(folder / "tokenizer")
    return LoadedRun(config, setup.mesh, setup.model, params, tokenizer, step or 0)
