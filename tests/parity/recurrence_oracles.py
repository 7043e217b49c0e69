"""Linear recurrences of transformers and fla-core (its naive files) on arrays drawn here,
and how far ours are from them."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import torch

from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.params import RecurrenceOperands
from tests.pallas_kernels.recurrence_cases import (
    SCALE,
    H,
    K,
    N,
    RecurrenceCase,
    draw_case,
    draw_cotangents,
)

Arrays = Sequence[np.ndarray]
Prepare = Callable[..., tuple[RecurrenceOperands, jax.Array | None]]


class Oracle(NamedTuple):
    """A torch function and the arrays that it and ours are called with."""

    arrays: Arrays
    """What gradients are taken by."""
    cotangents: Arrays
    """Of the output and the final state."""
    run: Callable[..., Sequence[torch.Tensor]]
    """Of tensors: the output [B, T, N, V] and the final state [B, N, K, V]."""
    prepare: Prepare
    """Of arrays: our operands and initial state."""
    scale: float


class OracleErrors(NamedTuple):
    """Largest errors, relative to the largest value where that is above 1."""

    forward: float
    """Of the output and the final state."""
    backward: float
    """Of the gradients."""


def measure_errors(oracle: Oracle, chunk_size: int) -> OracleErrors:
    tensors = [torch.from_numpy(x.copy()).requires_grad_() for x in oracle.arrays]
    results = oracle.run(*tensors)
    pairs = zip(oracle.cotangents, results, strict=True)
    total = sum((torch.from_numpy(d) * result).sum() for d, result in pairs)
    gradients = torch.autograd.grad(total, tensors)
    theirs = [x.detach().numpy() for x in (*results, *gradients)]
    ours = _run_ours(
        list(oracle.arrays),
        list(oracle.cotangents),
        oracle.prepare,
        oracle.scale,
        chunk_size,
    )
    errors = [
        float(np.abs(np.asarray(x) - expected).max() / max(1.0, np.abs(expected).max()))
        for x, expected in zip(ours, theirs, strict=True)
    ]
    return OracleErrors(max(errors[:2]), max(errors[2:]))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _run_ours(
    arrays: list[jax.Array],
    cotangents: list[jax.Array],
    prepare: Prepare,
    scale: float,
    chunk_size: int,
) -> list[jax.Array]:
    """Output, final state, and gradients by arrays."""

    def run(*arrays):
        operands, state = prepare(*arrays)
        return linear_recurrence(
            *operands, initial_state=state, scale=scale, chunk_size=chunk_size
        )

    results, pull = jax.vjp(run, *arrays)
    return [*results, *pull(tuple(cotangents))]


def load_fla(name: str) -> ModuleType:
    """Loads a naive file of fla-core by its path: the package imports triton.

    Raises:
        ImportError: fla-core or einops is not installed.
    """
    try:
        package = distribution("fla-core")
    except PackageNotFoundError as error:
        raise ImportError("fla-core is not installed: make test-parity") from error
    path = package.locate_file(f"fla/ops/{name}/naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{name}", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_qwen3_next(form: str, num_tokens: int) -> Oracle:
    from transformers.models.qwen3_next import modeling_qwen3_next

    function = getattr(modeling_qwen3_next, f"torch_{form}_gated_delta_rule")
    return _make_delta(draw_case("gated delta", num_tokens), function)


def make_kimi_linear(form: str, num_tokens: int) -> Oracle:
    from transformers.models.kimi_linear import modeling_kimi_linear

    function = getattr(modeling_kimi_linear, f"{form}_kimi_delta_attention")
    return _make_delta(_repeat_heads(draw_case("kimi delta", num_tokens)), function)


def make_fla_gated_delta(num_tokens: int) -> Oracle:
    function = load_fla("gated_delta_rule").naive_recurrent_gated_delta_rule
    return _make_delta(_repeat_heads(draw_case("gated delta", num_tokens)), function)


def make_fla_kimi_delta(num_tokens: int) -> Oracle:
    function = load_fla("kda").naive_recurrent_kda
    return _make_delta(draw_case("kimi delta", num_tokens), function)


def _make_delta(
    case: RecurrenceCase, function: Callable[..., Sequence[torch.Tensor]]
) -> Oracle:
    def run(q, k, v, log_decay, beta, state):
        return function(
            q,
            k,
            v,
            g=log_decay,
            beta=beta,
            initial_state=state,
            output_final_state=True,
        )

    arrays = [x for x in (*case.operands, case.initial_state) if x is not None]
    return Oracle(arrays, draw_cotangents(case), run, _with_state, SCALE)


def _with_state(q, k, v, log_decay, beta, state):
    return RecurrenceOperands(q, k, v, log_decay, beta), state


def _repeat_heads(case: RecurrenceCase) -> RecurrenceCase:
    """A key head a value head, for functions that know no groups."""
    q, k, *others = case.operands
    wide = [np.repeat(np.asarray(x), N // H, axis=2) for x in (q, k)]
    return case._replace(operands=RecurrenceOperands(*wide, *others))


def make_mamba_2(num_tokens: int) -> Oracle:
    """With Δ, A, B and C as its mixer gives them, in two groups."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    case = draw_case("state space", num_tokens)
    C, B, x, *_ = case.operands
    rng = np.random.default_rng(3)
    delta = rng.random((2, num_tokens, N)).astype(np.float32)
    A = -rng.random(N).astype(np.float32)
    # Its states are [values, keys].
    state = case.initial_state.swapaxes(2, 3).copy()
    arrays = [np.asarray(a) for a in (x, delta, A, B, C, state)]

    def run(x, delta, A, B, C, state):
        output, final = mamba2_chunk_scan(
            x,
            delta,
            A,
            B,
            C,
            chunk_size=24,
            initial_states=state,
            return_final_states=True,
        )
        return output, final.transpose(2, 3)

    def prepare(x, delta, A, B, C, state):
        operands = RecurrenceOperands(C, B, delta[..., None] * x, A * delta)
        return operands, state.swapaxes(2, 3)

    return Oracle(arrays, draw_cotangents(case), run, prepare, 1.0)


class _OpenGate(torch.nn.Module):
    """A gate whose sigmoid is 1."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.full_like(hidden[..., : hidden.shape[-1] // 3], 100.0)


def make_minimax(num_tokens: int) -> Oracle:
    """Its layer without projections and norm, so that lightning attention is left."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads = 3
    config = MiniMaxConfig(
        hidden_size=heads * K,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=K,
        block_size=24,
        num_hidden_layers=4,
    )
    layer = MiniMaxLightningAttention(config, layer_idx=1)
    for name in ("qkv_proj", "act_fn", "norm", "out_proj"):
        setattr(layer, name, torch.nn.Identity())
    layer.output_gate = _OpenGate()
    empty_cache = SimpleNamespace(
        get_linear_cache=lambda index: None, set_linear_cache=lambda index, state: None
    )
    slopes = layer.slope_rate.reshape(heads).numpy()
    log_decay = np.broadcast_to(-slopes, (2, num_tokens, heads)).astype(np.float32)

    def run(q, k, v):
        hidden = torch.cat([q, k, v], dim=3).reshape(2, num_tokens, -1)
        output, final = layer(hidden, None, None, empty_cache)
        return output.reshape(v.shape), final

    def prepare(q, k, v):
        return RecurrenceOperands(q, k, v, log_decay), None

    rng = np.random.default_rng(1)
    shape = (2, num_tokens, heads, K)
    arrays = list(rng.standard_normal((3, *shape)).astype(np.float32))
    shapes = shape, (2, heads, K, K)
    cotangents = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return Oracle(arrays, cotangents, run, prepare, 1.0)


ORACLES: dict[str, Callable[[int], Oracle]] = {
    "Qwen3-Next, chunks": partial(make_qwen3_next, "chunk"),
    "Qwen3-Next, token by token": partial(make_qwen3_next, "recurrent"),
    "Kimi Linear, chunks": partial(make_kimi_linear, "chunk"),
    "Kimi Linear, token by token": partial(make_kimi_linear, "recurrent"),
    "Mamba-2": make_mamba_2,
    "MiniMax's lightning attention": make_minimax,
    "fla-core, gated delta rule": make_fla_gated_delta,
    "fla-core, Kimi delta attention": make_fla_kimi_delta,
}
