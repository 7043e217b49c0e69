"""What any process of a run wants, known to all of them at the same step.

A process may be told to stop between any two steps, and another a step later. So each says with
every step what it wants, and all act on what anyone said at that step: a maximum over the mesh,
queued behind the step itself, that nobody waits for.
"""

from enum import IntFlag
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.sharding import on_mesh


class Wish(IntFlag):
    """What a process may want of all."""

    NONE = 0
    SAVE = 1
    """A checkpoint: it is time for one."""
    INTERRUPT = 2
    """Stop: its user said so."""
    PREEMPT = 4
    """Stop: its scheduler said so, and will start the run again."""

    @property
    def stops(self) -> bool:
        return bool(self & (Wish.INTERRUPT | Wish.PREEMPT))


class Agreement:
    """Makes wishes known over a mesh; of a single process it is what that one wants."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._shape = mesh.size, len(Wish)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._most = on_mesh(mesh, jax.jit(lambda rows: jnp.max(rows, axis=0)))

    def propose(self, wish: Wish) -> Any:
        """Say what this process wants at this step; what :meth:`agreed` takes."""
        if self._alone:
            return wish
        row = np.array([[each in wish for each in Wish]], np.int32)
        proposed = jax.make_array_from_callback(self._shape, self._sharding, lambda _: row)
        return self._most(proposed)

    def agreed(self, proposed: Any) -> Wish:
        """What anyone wanted; waits for the step."""
        if self._alone:
            return proposed
        wanted = zip(Wish, np.asarray(proposed.addressable_data(0)), strict=True)
        return Wish(sum(each for each, asked in wanted if asked))
