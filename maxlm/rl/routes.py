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
from maxlm.models.architectures.routes import get_route_shape
from maxlm.rl.samples import Sample

ROUTES = "routes"
"""Name of a batch's array of routes."""
_LENGTHS = "routes_lengths"


def declare_routes(model: TransformerConfig, seq_len: int) -> BatchArraySpec:
    """Declares a row's routes, [S, E, k]. Raises MaxlmError: the model has no
    experts."""
    shape = get_route_shape(model)
    if not shape.num_layers:
        message = "routes are to be replayed, and the model has no experts"
        fix = "set it to false"
        raise MaxlmError(message, where="task.replay_routes", fix=fix)
    row_shape = (seq_len, shape.num_layers, shape.experts_per_token)
    return BatchArraySpec(row_shape, shape.dtype, ("seq", None, None))


def get_routes(batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """Returns what a model is called with as ``routes``; None: its routers choose."""
    return batch.get(ROUTES)


def extend_routes(sample: Sample, reported: np.ndarray, start: int) -> None:
    """Adds what the engine reports of a sample's tokens from ``start`` on, [tokens, E,
    k]. Those of tokens that are known stay where a later request reads them anew, as
    drawn tokens follow from them; those of tokens that the sample does not have are
    left out."""
    num_known = len(sample.routes)
    sample.routes += list(reported[max(0, num_known - start) :])
    del sample.routes[len(sample.tokens) :]


def routes_to_arrays(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Returns arrays from which :func:`routes_from_arrays` makes the routes of samples;
    none where no sample has any."""
    routes = [token_routes for sample in samples for token_routes in sample.routes]
    if not routes:
        return {}
    lengths = [len(sample.routes) for sample in samples]
    return {ROUTES: np.stack(routes), _LENGTHS: np.array(lengths, np.int64)}


def routes_from_arrays(
    arrays: Mapping[str, np.ndarray], prefix: str, num_samples: int
) -> list[list[np.ndarray]]:
    """Makes the routes of so many samples, of what :func:`routes_to_arrays` returned,
    with keys that begin with ``prefix``."""
    if f"{prefix}{ROUTES}" not in arrays:
        return [[] for _ in range(num_samples)]
    ends = np.cumsum(arrays[f"{prefix}{_LENGTHS}"])
    parts = np.split(arrays[f"{prefix}{ROUTES}"], ends[:-1])
    return [list(part) for part in parts]
