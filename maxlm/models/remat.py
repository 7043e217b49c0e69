"""Rematerialisation: the backward pass keeps intermediates by name.

Layers tag their intermediates with ``checkpoint_name``; a policy lists the tags that
stay in memory, and everything else of a layer is computed again. Costs are for one
decoder layer, in elements a token (D: d_model, N·H: query heads, K·H: kv heads, F:
FFN).
"""

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")
RematPolicy = Literal["none", "full", "attention", "mlp", "matmuls"]

SAVED: dict[str, tuple[str, ...]] = {
    "full": (),  # D: the layer's input alone; one more forward pass
    "attention": ("attention",),  # + N·H + N: attention itself is not computed again
    "mlp": ("mlp_up", "mlp_gate"),  # + 2·F: the widest products are not; attention is
    # + N·H + N + N·H + 2·K·H + 2·F: element-wise maps only
    "matmuls": ("qkv", "attention", "mlp_up", "mlp_gate"),
}


def apply_remat(
    layer: Callable[P, T], policy: RematPolicy, *, is_loop_body: bool = True
) -> Callable[P, T]:
    """Applies a policy to ``layer``; "none" recomputes only :func:`save_inputs_only`.

    Args:
        is_loop_body: whether it is all there is to a loop's body. Otherwise a compiler
            could do the work of several layers again at once, and hold all of it, or,
            in one program with their forward pass, not do it again at all: a barrier
            makes each wait for its gradient.
    """
    if policy == "none":
        return layer
    return jax.checkpoint(
        layer,
        policy=jax.checkpoint_policies.save_only_these_names(*SAVED[policy]),
        prevent_cse=not is_loop_body,
    )


def save_inputs_only(function: Callable[P, T]) -> Callable[P, T]:
    """Wraps a cheap ``function``: a scanned layer's backward pass keeps its arguments
    alone, under any policy, for what lies between is several times as large."""
    return jax.checkpoint(function, prevent_cse=False)
