"""Linear recurrences in chunks against transformers' torch functions and fla-core's naive
ones: outputs, final states and gradients of every operand."""

import importlib.util
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.params import RecurrenceOperands
from tests.pallas_kernels.recurrence_cases import (
    SCALE,
    H,
    K,
    N,
    RecurrenceCase,
    draw_case,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHUNK = 32
# T = 1, a chunk, a token beside it on both sides, and many chunks.
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 163)


def load_fla(path: str) -> ModuleType:
    """Loads a file of fla-core by its path: its package imports triton."""
    pytest.importorskip("einops")
    try:
        files = distribution("fla-core")
    except PackageNotFoundError:
        pytest.skip("fla-core is not installed: make test-parity")
    location = files.locate_file(f"fla/ops/{path}/naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{path}", str(location))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_torch(function: Callable[..., Any], arrays: list, cotangents: list) -> list:
    """Outputs of a torch function, and its gradients by arrays."""
    tensors = [torch.from_numpy(x.copy()).requires_grad_() for x in arrays]
    results = function(*tensors)
    total = sum(
        (torch.from_numpy(d) * result).sum()
        for d, result in zip(cotangents, results, strict=True)
    )
    gradients = torch.autograd.grad(total, tensors)
    return [x.detach().numpy() for x in (*results, *gradients)]


@partial(jax.jit, static_argnums=(1, 2))
def run_ours(
    arrays: list, function: Callable[..., Any], scale: float, cotangents: list
):
    def run(*arrays):
        operands, state = function(*arrays)
        return linear_recurrence(
            *operands, initial_state=state, scale=scale, chunk_size=CHUNK
        )

    results, pull = jax.vjp(run, *arrays)
    return [*results, *pull(tuple(cotangents))]


def compare(ours: list, theirs: list) -> None:
    """Outputs and states to 1e-5, gradients to 1e-4."""
    for number, (result, expected) in enumerate(zip(ours, theirs, strict=True)):
        bound = 1e-5 if number < 2 else 1e-4
        bound *= max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=bound)


def draw_cotangents(case: RecurrenceCase) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = case.operands.v.shape, case.initial_state.shape
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def with_state(q, k, v, log_decay, beta, state):
    return RecurrenceOperands(q, k, v, log_decay, beta), state


def check_delta(case: RecurrenceCase, function: Callable[..., Any]) -> None:
    """Compares with a function of q, k, v, log decay, β and a state."""
    arrays = [*case.operands, case.initial_state]
    cotangents = draw_cotangents(case)
    theirs = run_torch(function, arrays, cotangents)
    compare(run_ours(arrays, with_state, SCALE, cotangents), theirs)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gated_delta_of_qwen3_next(form, tokens):
    from transformers.models.qwen3_next import modeling_qwen3_next

    function = getattr(modeling_qwen3_next, f"torch_{form}_gated_delta_rule")

    def run(q, k, v, log_decay, beta, state):
        return function(
            q, k, v, log_decay, beta, initial_state=state, output_final_state=True
        )

    check_delta(draw_case("gated delta", tokens), run)


def repeat_key_heads(case: RecurrenceCase) -> RecurrenceCase:
    """A key head a value head, for functions that know no groups."""
    q, k, *others = case.operands
    wide = [np.repeat(x, N // H, axis=2) for x in (q, k)]
    return case._replace(operands=RecurrenceOperands(*wide, *others))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_kimi_delta(form, tokens):
    from transformers.models.kimi_linear import modeling_kimi_linear

    function = getattr(modeling_kimi_linear, f"{form}_kimi_delta_attention")

    def run(q, k, v, log_decay, beta, state):
        return function(
            q, k, v, log_decay, beta, initial_state=state, output_final_state=True
        )

    check_delta(repeat_key_heads(draw_case("kimi delta", tokens)), run)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", ["gated delta", "kimi delta"])
def test_naive_files_of_fla(kind, tokens):
    case = draw_case(kind, tokens)
    if kind == "gated delta":
        function = load_fla("gated_delta_rule").naive_recurrent_gated_delta_rule
        # It takes as many key heads as value heads.
        case = repeat_key_heads(case)
    else:
        function = load_fla("kda").naive_recurrent_kda

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

    check_delta(case, run)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_state_space_of_mamba_2(tokens):
    """With Δ, A, B, C as its mixer gives them, in two groups."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    case = draw_case("state space", tokens)
    C, B, x, _, _ = case.operands
    rng = np.random.default_rng(3)
    delta = rng.random((2, tokens, N)).astype(np.float32)
    A = -rng.random(N).astype(np.float32)
    # Its states are [values, keys].
    arrays = [x, delta, A, B, C, case.initial_state.swapaxes(2, 3).copy()]

    def run_theirs(x, delta, A, B, C, state):
        output, final = mamba2_chunk_scan(
            x,
            delta,
            A,
            B,
            C,
            chunk_size=CHUNK,
            initial_states=state,
            return_final_states=True,
        )
        return output, final.transpose(2, 3)

    def prepare(x, delta, A, B, C, state):
        operands = RecurrenceOperands(C, B, delta[..., None] * x, A * delta)
        return operands, state.swapaxes(2, 3)

    cotangents = draw_cotangents(case)
    theirs = run_torch(run_theirs, arrays, cotangents)
    compare(run_ours(arrays, prepare, 1.0, cotangents), theirs)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_lightning_attention_of_minimax(tokens):
    """Its layer with projections and norm of one, so that the recurrence is left."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads = 3
    config = MiniMaxConfig(
        hidden_size=heads * K,
        num_attention_heads=heads,
        head_dim=K,
        block_size=24,
        num_hidden_layers=4,
        num_key_value_heads=heads,
    )
    layer = MiniMaxLightningAttention(config, layer_idx=1)
    one = torch.nn.Identity()
    layer.qkv_proj = layer.act_fn = layer.norm = layer.out_proj = one
    # A gate of sigmoid(100), which is 1.
    layer.output_gate = lambda x: torch.full((*x.shape[:2], heads * K), 100.0)
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, tokens, heads, K)).astype(np.float32)
    slopes = layer.slope_rate.reshape(heads).numpy()
    log_decay = np.broadcast_to(-slopes, (2, tokens, heads)).astype(np.float32)

    def run_theirs(q, k, v):
        hidden = torch.cat([q, k, v], dim=3).reshape(2, tokens, -1)
        output, final = layer(
            hidden,
            None,
            None,
            SimpleNamespace(
                get_linear_cache=lambda index: None,
                set_linear_cache=lambda index, state: None,
            ),
        )
        return output.reshape(2, tokens, heads, K), final

    def prepare(q, k, v):
        return RecurrenceOperands(q, k, v, log_decay), None

    shapes = (2, tokens, heads, K), (2, heads, K, K)
    cotangents = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    theirs = run_torch(run_theirs, [q, k, v], cotangents)
    compare(run_ours([q, k, v], prepare, 1.0, cotangents), theirs)
