"""Optimizers: gradients in, parameter updates out, as one optax transformation; and
schedules of their learning rate: a warm-up, then a shape.

Every kind of optimizer is the same chain: clip by global norm, turn gradients into a
direction, add decoupled weight decay where it belongs, multiply by the learning rate.
Only the direction differs.
"""

from math import prod, sqrt
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.models.params import Params, ParamSpec, flatten_names, join_path
from maxlm.optim.state import split_params
from maxlm.parallel.local import gather_to_spec
from maxlm.sharding import AxisRules


class OptimizerConfig(Config):
    """Settings by which gradients become updates."""

    kind: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """adamw: two fp32 moments a parameter (8 bytes). lion: the sign of one moment (4
    bytes); wants a learning rate 3–10× lower and a weight decay as much higher.
    adafactor: a factored second moment (about 0 bytes) and no first. muon: one moment
    (4 bytes), orthogonalised, on hidden matrices, at the cost of `ns_steps` × 3 matrix
    products each; AdamW on all else."""
    b1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (adamw; muon's AdamW); of lion's interpolation."""
    b2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment (adamw; muon's AdamW); of lion's moment, whose paper
    has 0.99."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to adamw's denominator: gradients well below it no longer move a
    parameter."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Share of a parameter's value taken off each step, times the learning rate; on
    matrices, embeddings and the output head, never on norm scales, biases or sinks."""
    clip_norm: float | None = Field(default=1.0, ge=0)
    """Gradients with a larger global norm are scaled down to it; 0 or null: never."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon: decay of its (Nesterov) moment."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Muon: Newton–Schulz iterations; fewer leave singular values further from 1."""
    update_rms: float = Field(default=0.2, gt=0)
    """Muon: root mean square of a full-rank update before the learning rate. 0.2 is
    about AdamW's, so that both use one learning rate and weight decay (arXiv
    2502.16982, section 2.2)."""
    decay_exponent: float = Field(default=0.8, gt=0, le=1)
    """Adafactor: its second moment decays by 1 - t^-exponent at step t."""
    rule_step: float = Field(default=1e-3, ge=0)
    """Step of parameters that learn by a rule, the selection biases of routers,
    whatever the learning rate; DeepSeek-V3 has 0.001, and 0 for the last of its
    tokens."""


class ScheduleConfig(Config):
    """The learning rate as a function of the step."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """constant: the peak to the end. cosine, linear: down to the final rate over the
    whole run, so the run's length must be known before it starts. wsd (warm-up, stable,
    decay): the peak, then down linearly over the last `decay_fraction` of the run; its
    stable part can be extended, or decayed more than once, without starting over."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The peak."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps before the first one at the peak; the rate rises linearly, never from
    exactly zero."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the run that wsd spends decaying; the other kinds ignore it."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Rate at the end of the run / peak; constant ignores it."""


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """Makes the learning rate's schedule of 0-based steps: ``schedule(step) -> float32
    scalar``.

    With peak p, warm-up w and total t: ``p (s + 1) / (w + 1)`` for ``s < w``; ``p`` at
    ``s = w``; ``p · final_fraction`` at ``s = t`` (one past the last step, so that no
    step is spent at zero). Raises MaxlmError: the warm-up, or the warm-up and the
    decay, are longer than the run."""
    peak, warmup, final = (
        config.learning_rate,
        config.warmup_steps,
        config.final_fraction,
    )
    if warmup > total_steps:
        what = f"warmup_steps={warmup} is longer than the run of {total_steps} steps"
        fix = f"set warmup_steps to {total_steps} or less, or train for longer"
        raise MaxlmError(what, where="schedule", fix=fix)
    rest = total_steps - warmup
    if config.kind == "constant":
        shape = optax.constant_schedule(peak)
    elif config.kind == "cosine":
        shape = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=final)
    elif config.kind == "linear":
        shape = optax.linear_schedule(peak, peak * final, max(rest, 1))
    else:
        decay = max(round(config.decay_fraction * total_steps), 1)
        if decay > max(rest, 1):
            raise MaxlmError(
                f"warmup_steps={warmup} and a decay of {decay} steps are longer than "
                f"the run of "
                f"{total_steps} steps",
                where="schedule",
                fix="lower warmup_steps or decay_fraction",
            )
        shape = optax.linear_schedule(
            peak, peak * final, decay, transition_begin=rest - decay
        )
    if warmup == 0:
        return shape
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, shape], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    """Makes the transformation ``update(grads, state, params) -> (updates, state)``.

    Gradients and parameters are fp32 trees like ``specs`` (of the trained parameters),
    each pair in one layout; updates come out in that layout, to be *added* to the
    parameters. ``init`` takes all of a model's. The state is fp32. Runs on explicit
    meshes, inside or outside jit.
    """
    inner = _by_gradient(config, schedule, specs)
    if any(spec.sign_update for spec in jax.tree.leaves(specs)):
        rule = optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda g: -config.rule_step * jnp.sign(g), updates
            )
        )
        learned = jax.tree.map(
            lambda spec: optax.MaskedNode() if spec.sign_update else spec, specs
        )
        labels = jax.tree.map(
            lambda spec: "rule" if spec.sign_update else "gradient", specs
        )
        by_gradient = _by_gradient(config, schedule, learned)
        inner = optax.partition({"gradient": by_gradient, "rule": rule}, labels)
    return optax.GradientTransformation(
        lambda params: inner.init(split_params(params, specs)[0]), inner.update
    )


def _by_gradient(
    config: OptimizerConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    decayed = jax.tree.map(lambda spec: spec.role != "vector", specs)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm)
        if config.clip_norm
        else optax.identity(),
        _direction(config, specs),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


def shard_optimizer(
    inner: optax.GradientTransformation,
    specs: Params,
    optimizer_rules: AxisRules,
    storage_rules: AxisRules,
) -> optax.GradientTransformation:
    """Makes an optimizer whose state, and so its work, lies by ``optimizer_rules``:
    each device updates its share of every parameter, and the updates are gathered
    (ZeRO-1 and 2)."""
    if optimizer_rules == storage_rules:
        return inner

    def moved(tree: Any, rules: AxisRules) -> Any:
        return jax.tree.map(
            lambda s, x: gather_to_spec(x, rules.spec(*s.axes)), specs, tree
        )

    def update(updates, state, params=None):
        params = None if params is None else moved(params, optimizer_rules)
        updates, state = inner.update(moved(updates, optimizer_rules), state, params)
        return moved(updates, storage_rules), state

    return optax.GradientTransformation(inner.init, update)


def _direction(config: OptimizerConfig, specs: Params) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)
    if config.kind == "adamw":
        return adam
    if config.kind == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=jnp.float32)
    if config.kind == "adafactor":
        return scale_by_factored_rms(specs, config.decay_exponent)

    def dims(spec: ParamSpec) -> MuonDimensionNumbers | optax.MaskedNode:
        if spec.role != "matrix":
            return optax.MaskedNode()
        inputs, outputs = get_input_output_dims(spec)
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    def to_rms(update: jax.Array, spec: ParamSpec) -> jax.Array:
        # An orthogonal [m, n] matrix has a root mean square of 1 / sqrt(max(m, n)).
        fans = (
            prod(spec.shape[d] for d in group) for group in get_input_output_dims(spec)
        )
        return update * (config.update_rms * sqrt(max(fans)))

    matrices = jax.tree.map(
        lambda s: s if s.role == "matrix" else optax.MaskedNode(), specs
    )
    muon = optax.chain(
        scale_by_muon(
            ns_steps=config.ns_steps,
            beta=config.momentum,
            mu_dtype=jnp.float32,
            weight_dimension_numbers=jax.tree.map(dims, specs),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, matrices)),
    )
    labels = jax.tree.map(
        lambda spec: "muon" if spec.role == "matrix" else "adamw", specs
    )
    return optax.partition({"muon": _in_auto_mode(muon), "adamw": adam}, labels)


class FactoredState(NamedTuple):
    """fp32 means of squared gradients; reduced dimensions are kept, with size 1."""

    count: jax.Array
    rows: Params
    """Matrices and tables: the mean over output dimensions. Vectors: the full second
    moment."""
    columns: Params
    """The mean over input dimensions; a ``MaskedNode`` for vectors."""


def get_input_output_dims(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (input, output) dimensions of a matrix or table; layers, experts are
    neither."""
    inner = [
        d
        for d, axis in enumerate(spec.axes)
        if d >= spec.num_layer_axes and axis != "expert"
    ]
    inputs = spec.contracting_dims or (inner[0],)
    return inputs, tuple(d for d in inner if d not in inputs)


def scale_by_factored_rms(
    specs: Params,
    decay_exponent: float = 0.8,
    clip_rms: float = 1.0,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """Adafactor without its relative step size (Shazeer & Stern 2018, algorithms 4 and
    5), factored over the matrix that a parameter really is.

    Optax factors an array's two largest dimensions. On weights stacked by layer, with
    heads as a dimension of their own, those two are an accident of the sizes (even
    layers can be one); here they are the inputs and the outputs of each layer's linear
    map, so that the result does not depend on how parameters are stored.

    At step t the second moment decays by ``1 - t ** -decay_exponent``; each layer's
    update is then scaled down to a root mean square of at most ``clip_rms``.
    """

    def split(results: Any, count: int) -> tuple[Any, ...]:
        """Makes trees of a tree of tuples."""
        return tuple(
            jax.tree.map(lambda _, r, i=i: r[i], specs, results) for i in range(count)
        )

    def init(params: optax.Params) -> FactoredState:
        def one(spec: ParamSpec, p: jax.Array) -> tuple[Any, Any]:
            if spec.role == "vector":
                return jnp.zeros_like(p, dtype=jnp.float32), optax.MaskedNode()
            columns, rows = (
                jnp.zeros(
                    [1 if d in dims else n for d, n in enumerate(spec.shape)],
                    jnp.float32,
                )
                for dims in get_input_output_dims(spec)
            )
            return rows, columns

        return FactoredState(
            jnp.zeros([], jnp.int32), *split(jax.tree.map(one, specs, params), 2)
        )

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, FactoredState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

        def one(
            spec: ParamSpec, g: jax.Array, rows: Any, columns: Any
        ) -> tuple[Any, Any, Any]:
            square = jnp.square(g) + eps
            if spec.role == "vector":
                rows = decay * rows + (1 - decay) * square
                out = g * jax.lax.rsqrt(rows)
            else:
                inputs, outputs = get_input_output_dims(spec)
                rows = decay * rows + (1 - decay) * square.mean(outputs, keepdims=True)
                columns = decay * columns + (1 - decay) * square.mean(
                    inputs, keepdims=True
                )
                share = rows / rows.mean(inputs, keepdims=True)
                out = g * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns)
            own = (d for d, axis in enumerate(spec.axes) if axis != "expert")
            layer = tuple(d for d in own if d >= spec.num_layer_axes)
            rms = jnp.sqrt(jnp.square(out).mean(layer, keepdims=True))
            return out / jnp.maximum(1.0, rms / clip_rms), rows, columns

        out, *moments = split(
            jax.tree.map(one, specs, updates, state.rows, state.columns), 3
        )
        return out, FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)


def _in_auto_mode(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let the compiler lay out what happens inside; updates and state keep their
    layouts."""

    def update(updates, state, params=None):
        del params
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        run: Any = jax.sharding.auto_axes(
            lambda u, s: inner.update(u, s), out_sharding=layouts
        )
        return run(updates, state)

    return optax.GradientTransformation(inner.init, update)


def opt_state_specs(
    optimizer: optax.GradientTransformation, specs: Params
) -> optax.OptState:
    """Returns the optimizer's state with a declaration for every array; no device is
    touched.

    An array under a parameter's path has that parameter's axes on every dimension it
    shares with it (moments: all; factored moments: those not reduced to 1). All else is
    whole everywhere.
    """
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    owners = flatten_names(specs)

    def describe(path: tuple, leaf: jax.ShapeDtypeStruct) -> ParamSpec:
        name = f".{join_path(path)}"
        axes = (None,) * len(leaf.shape)
        found = max(
            (own for own in owners if name.endswith(f".{own}")), key=len, default=None
        )
        if found is not None and len((owner := owners[found]).shape) == len(leaf.shape):
            kept = zip(owner.axes, leaf.shape, owner.shape, strict=True)
            axes = tuple(axis if n == full else None for axis, n, full in kept)
        return ParamSpec(
            leaf.shape, axes, jax.nn.initializers.zeros, "vector", dtype=leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(
        describe, jax.eval_shape(optimizer.init, params)
    )
