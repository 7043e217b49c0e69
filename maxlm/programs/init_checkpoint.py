"""Fresh states, with random parameters or another run's (``train.start_from``).

An adapted run starts from one with the same adapter, or from one without: its parameters then are
the base of this one's.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from maxlm.models.params import replace_base, select_base
from maxlm.programs.setup import Setup
from maxlm.train.checkpoint import FolderTier, group_sizes
from maxlm.train.state import TrainState


def find_init_checkpoint(setup: Setup, stack: ExitStack) -> FolderTier | None:
    """Returns the checkpoints of the run whose parameters this one starts from, if any.

    Raises:
        MaxlmError: none there, or of another model.
    """
    if setup.config.train.start_from is None:
        return None
    folder = Path(setup.config.train.start_from) / "checkpoints"
    tier = FolderTier(folder, read_only=True, grouped=group_sizes(setup.specs))
    stack.enter_context(tier)
    wanted = setup.abstract_state.params
    wanted = wanted if _is_adapted(tier) else select_base(wanted)
    tier.check_params(None, wanted, _eval_params_name(tier))
    return tier


def init_state(setup: Setup, init_checkpoint: FolderTier | None) -> TrainState:
    """Returns a fresh state, with another run's parameters if ``init_checkpoint`` is given."""
    state = setup.init()
    if init_checkpoint is None:
        return state
    abstract = setup.abstract_state.params
    init_checkpoint.reload()  # Its run may still train, and delete old ones.
    name = _eval_params_name(init_checkpoint)
    if _is_adapted(init_checkpoint):
        params = init_checkpoint.restore_params(None, abstract, name)
    else:
        base = init_checkpoint.restore_params(None, select_base(abstract), name)
        params = replace_base(state.params, base)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, ema=ema)


def _is_adapted(tier: FolderTier) -> bool:
    return tier.metadata()["config"].get("adapter") is not None


def _eval_params_name(tier: FolderTier) -> str:
    average = tier.metadata()["config"]["train"].get("ema_decay") is not None
    return "ema" if average else "params"
