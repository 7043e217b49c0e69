"""What a layer's mixer returns."""

from typing import NamedTuple

import jax

from maxlm.models.aux import Aux
from maxlm.models.caches import LayerCache
from maxlm.models.layers.attend import KeysValues


class MixerOutput(NamedTuple):
    """A mixer's output, and what comes with it."""

    y: jax.Array
    """[B, S, D], for the residual stream."""
    cache: LayerCache = None
    """With a cache: the same with these tokens in it."""
    aux: Aux = Aux()
    """What the layer adds to the loss and the log."""
    keys_values: KeysValues | None = None
    """Without a cache: what it has attended to, which later layers may read
    (``LayerKind.keys_of``)."""
