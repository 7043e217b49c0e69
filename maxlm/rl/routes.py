"""Router replay: the experts that tokens met in the engine, in the rows of a policy.

An engine and a training pass that round differently choose different experts for some
tokens, and every token behind these sees it: log-probabilities differ far more than by
rounding. A training pass that uses the engine's experts, with weights of its own
router, differs by rounding alone (Ma et al. 2025, arXiv 2510.11370).

Shapes: S tokens of a row, E layers with experts, k experts of a token.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.routes import OWN_CHOICE, get_route_shape
from maxlm.rl.samples import Sample

ROUTES = "routes"
"""Name of a batch's array of routes."""


def declare_routes(model: TransformerConfig, seq_len: int) -> BatchArraySpec:
    """Declares a row's routes, [S, E, k]. Raises MaxlmError: the model has no
    experts."""
    shape = get_route_shape(model)
    if not shape.num_layers:
        message = "routes are to be replayed, and the model has no experts"
        raise MaxlmError(message, where="task", fix="turn router replay off")
    row_shape = (seq_len, shape.num_layers, shape.experts_per_token)
    return BatchArraySpec(row_shape, shape.dtype, ("seq", None, None))


def get_routes(batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """Returns what a model is called with as ``routes``; None: its routers choose."""
    return batch.get(ROUTES)


def extend_routes(known: np.ndarray | None, later: np.ndarray) -> np.ndarray:
    """Returns the routes of a conversation's tokens after one more request to the
    engine, whose prompt are all tokens so far: those of known tokens stay, as drawn
    tokens follow from them.

    Args:
        known: [tokens, E, k] of the requests before; None: it is the first.
        later: ``SequenceOutput.routes`` of the whole request, of the prompt on.
    """
    if known is None:
        return later
    return np.concatenate([known, later[len(known) :]])


def make_row_routes(
    samples: Sequence[Sample], starts: Sequence[int], spec: BatchArraySpec
) -> np.ndarray:
    """Makes a row's routes, [S, E, k], of the samples that stand in it; tokens that the
    engine has not read, and padding, choose for themselves.

    Args:
        starts: the place of each sample's first token in the row.
        spec: what :func:`declare_routes` returns.
    """
    routes = np.full(spec.shape, OWN_CHOICE, spec.dtype)
    for sample, start in zip(samples, starts, strict=True):
        if sample.routes is None:
            continue
        # A sample's last token is a target alone.
        num_inputs = min(len(sample.tokens) - 1, len(sample.routes))
        end = min(start + num_inputs, len(routes))
        routes[start:end] = sample.routes[: end - start]
    return routes
