"""Constrained hyper-connections compute what DeepSeek-V4's modules of transformers do:
values and gradients, in fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

from transformers import DeepseekV4Config  # noqa: E402

from maxlm.models.build_context import BuildContext  # noqa: E402
from maxlm.models.hyper_connections import (  # noqa: E402
    ConstrainedConnection,
    HyperConnectionsConfig,
    HyperStreams,
)
from maxlm.models.layers.norm import NormConfig  # noqa: E402
from maxlm.models.params import bind  # noqa: E402
from maxlm.sharding import AxisRules  # noqa: E402
from tests.parity import compare  # noqa: E402

pytestmark = [pytest.mark.more, pytest.mark.heavy]
B, S, N, D = 2, 5, 3, 10
EPS = 1e-3
CONFIG = HyperConnectionsConfig(num_streams=N, sinkhorn_iterations=6, eps=EPS)
NORM = NormConfig(eps=2e-3)
CONTEXT = BuildContext(AxisRules(), jnp.float32, D, num_layers=2, init_std=0.02)
THEIR_CONFIG = DeepseekV4Config(
    hidden_size=D, hc_mult=N, hc_sinkhorn_iters=6, hc_eps=EPS, rms_norm_eps=NORM.eps
)


def randomize(module):
    """Parameters far from the initial ones, and as ours have them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values.to(torch.float32)
    return module


def to_kernel(matrix):
    """Theirs [outputs, N · D] → [N, D, outputs]."""
    return matrix.T.reshape(N, D, -1)


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=1e-5)


def test_a_connection_reads_writes_and_mixes_as_theirs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, S, N, D)).astype(np.float32)
    y = rng.standard_normal((B, S, D)).astype(np.float32)
    read_cotangent = rng.standard_normal((B, S, D)).astype(np.float32)
    cotangent = rng.standard_normal((B, S, N, D)).astype(np.float32)
    theirs = randomize(v4.DeepseekV4HyperConnection(THEIR_CONFIG))
    their_x = torch.tensor(x, requires_grad=True)
    post, comb, collapsed = theirs(their_x)
    written = post.unsqueeze(-1) * torch.tensor(y).unsqueeze(-2)
    written = written + torch.matmul(comb.transpose(-1, -2), their_x)
    (written * torch.tensor(cotangent)).sum().backward(retain_graph=True)
    (collapsed * torch.tensor(read_cotangent)).sum().backward()

    params = {
        "kernel": to_kernel(theirs.fn.detach().numpy()),
        "base": theirs.base.detach().numpy(),
        "scales": theirs.scale.detach().numpy(),
    }
    connection = ConstrainedConnection(CONFIG, NORM, CONTEXT)

    def run(params, x):
        bound = bind(connection, params)
        branch = bound.read(x)
        return branch.x, bound.write(x, y, branch)

    with jax.set_mesh(compare.one_device()):
        outputs, pull = jax.vjp(run, jax.tree.map(jnp.asarray, params), jnp.asarray(x))
        gradients, d_x = pull((read_cotangent, cotangent))
    assert_close(outputs[0], collapsed)
    assert_close(outputs[1], written)
    assert_close(d_x, their_x.grad)
    assert_close(gradients["base"], theirs.base.grad)
    assert_close(gradients["scales"], theirs.scale.grad)
    assert_close(gradients["kernel"], to_kernel(theirs.fn.grad))


def test_streams_are_joined_behind_the_last_layer_as_theirs():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((B, S, N, D)).astype(np.float32)
    cotangent = rng.standard_normal((B, S, D)).astype(np.float32)
    theirs = randomize(v4.DeepseekV4HyperHead(THEIR_CONFIG))
    their_x = torch.tensor(x, requires_grad=True)
    joined = theirs(their_x)
    (joined * torch.tensor(cotangent)).sum().backward()

    params = {
        "kernel": to_kernel(theirs.hc_fn.detach().numpy()),
        "base": theirs.hc_base.detach().numpy(),
        "scale": theirs.hc_scale.detach().numpy(),
    }
    streams = HyperStreams(CONFIG, NORM, CONTEXT)
    with jax.set_mesh(compare.one_device()):
        y, pull = jax.vjp(
            lambda params, x: bind(streams, params).contract(x),
            jax.tree.map(jnp.asarray, params),
            jnp.asarray(x),
        )
        gradients, d_x = pull(cotangent)
    assert_close(y, joined)
    assert_close(d_x, their_x.grad)
    assert_close(gradients["base"], theirs.hc_base.grad)
    assert_close(gradients["scale"], theirs.hc_scale.grad)
    assert_close(gradients["kernel"], to_kernel(theirs.hc_fn.grad))
