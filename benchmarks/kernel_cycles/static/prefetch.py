"""What a program's kernels find in scalar memory: the values of their integer operands.

Grids and loops follow tables (which block comes next, where a group starts) that the
program computes outside of the kernel. They are computed here from its jaxpr, and
nothing else is: an operand that hangs on an abstract argument or on a kernel's result
stays unknown.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

MAX_ELEMENTS = 1 << 18
"""Of an operand: what is larger is data, not a table."""

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_HLO_TYPES = {
    "bool": "pred",
    "bfloat16": "bf16",
    "float": "f",
    "uint": "u",
    "int": "s",
}


class NotKnown(Exception):
    """A value that hangs on an abstract argument or on a kernel's result."""


@dataclass
class KernelCall:
    """A ``pallas_call`` of a program."""

    shapes: list[str]
    """Of its operands, as HLO writes them."""
    values: dict[int, np.ndarray] = field(default_factory=dict)
    """Of integer operands that are known, by index."""


def kernel_calls(program: Any, args: Sequence[Any]) -> list[KernelCall]:
    """The kernels that a program calls outside of loops, in its order.

    Args:
        program: a ``ClosedJaxpr``.
        args: of it: arrays, or ``jax.ShapeDtypeStruct`` where only the shape is known.
    """
    known = [
        _unknown if isinstance(x, jax.ShapeDtypeStruct) else _constant(x) for x in args
    ]
    calls: list[KernelCall] = []
    _walk(program.jaxpr, [_constant(c) for c in program.consts], known, calls)
    return calls


def _unknown() -> Any:
    raise NotKnown


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _walk(
    jaxpr: Any, consts: list[Callable], args: list[Callable], calls: list[KernelCall]
) -> list[Callable]:
    """Thunks of ``jaxpr``'s results, each computed once if ever."""
    env: dict[Any, Callable] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Callable:
        return _constant(atom.val) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inner = next((eqn.params[k] for k in _INNER if k in eqn.params), None)
        name = eqn.primitive.name
        branch = _branch(eqn, inputs) if name == "cond" else None
        if name == "pallas_call":
            calls.append(_call(eqn, inputs))
            outputs = [_unknown] * len(eqn.outvars)
        elif name == "platform_index":
            outputs = [_constant(_tpu_index(eqn.params["platforms"]))]
        elif branch is not None:
            constants = [_constant(c) for c in branch.consts]
            outputs = _walk(branch.jaxpr, constants, inputs[1:], calls)
        elif name in ("scan", "while") or inner is None or not hasattr(inner, "eqns"):
            outputs = _evaluate(eqn, inputs)
        else:
            closed = inner if hasattr(inner, "consts") else None
            body = closed.jaxpr if closed else inner
            constants = [_constant(c) for c in closed.consts] if closed else []
            outputs = _walk(body, constants, inputs, calls)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _branch(eqn: Any, inputs: list[Callable]) -> Any:
    """The one that a ``cond`` takes, where that is known."""
    try:
        return eqn.params["branches"][int(inputs[0]())]
    except NotKnown:
        return None


def _tpu_index(platforms: Sequence[Sequence[str] | None]) -> np.int32:
    """Of the alternative that ``lax.platform_dependent`` takes on a TPU; None is the
    default."""
    for platform in ("tpu", None):
        for i, names in enumerate(platforms):
            if platform in names if platform and names else names is platform:
                return np.int32(i)
    raise ValueError(f"no alternative for a TPU among {platforms}")


def _evaluate(eqn: Any, inputs: list[Callable]) -> list[Callable]:
    done: list[Any] = []

    def compute() -> list[Any]:
        if not done:
            values = [thunk() for thunk in inputs]
            bind = eqn.primitive.get_bind_params(eqn.params)
            # jax 0.10 returns (functions, parameters), later ones parameters alone.
            functions, params = bind if isinstance(bind, tuple) else ((), bind)
            result = eqn.primitive.bind(*functions, *values, **params)
            done.append(result if eqn.primitive.multiple_results else [result])
        return done[0]

    return [lambda i=i: compute()[i] for i in range(len(eqn.outvars))]


def _call(eqn: Any, inputs: list[Callable]) -> KernelCall:
    call = KernelCall([hlo_shape(atom.aval) for atom in eqn.invars])
    for i, (atom, thunk) in enumerate(zip(eqn.invars, inputs, strict=True)):
        aval = atom.aval
        if np.issubdtype(aval.dtype, np.integer) and aval.size <= MAX_ELEMENTS:
            try:
                call.values[i] = np.asarray(thunk())
            except NotKnown:
                continue
    return call


def hlo_shape(aval: Any) -> str:
    """``int32[2, 3]`` as "s32[2,3]"."""
    name = str(aval.dtype)
    for prefix, short in _HLO_TYPES.items():
        if name.startswith(prefix):
            name = short + name[len(prefix) :]
            break
    return f"{name}[{','.join(map(str, aval.shape))}]"


def words(value: np.ndarray, layout: str) -> np.ndarray:
    """An array's bytes as they lie in memory, as uint32.

    Args:
        layout: as HLO writes it, "{1,0:T(8,128)(4,1)}": dimensions from the fastest
            varying, then tiles, the outermost first.
    """
    match = re.match(r"\{([\d,]*)(?::((?:T?\([\d,]+\))*))?", layout)
    order = [int(d) for d in match[1].split(",") if d] if match else []
    tiles = re.findall(r"\(([\d,]+)\)", match[2] or "") if match else []
    array = value.transpose(order[::-1]) if order else value
    for tile in tiles:
        sizes = [int(t) for t in tile.split(",")]
        array = array.reshape((1,) * (len(sizes) - array.ndim) + array.shape)
        outer, inner = array.shape[: -len(sizes)], array.shape[-len(sizes) :]
        pad = [(0, 0)] * len(outer)
        pad += [(0, -n % t) for n, t in zip(inner, sizes, strict=True)]
        array = np.pad(array, pad)
        split = [x for n, t in zip(inner, sizes, strict=True) for x in (-(-n // t), t)]
        array = array.reshape(*outer, *split)
        first = len(outer)
        whole = [first + 2 * i for i in range(len(sizes))]
        array = array.transpose(*range(first), *whole, *(w + 1 for w in whole))
    data = np.ascontiguousarray(array).tobytes()
    return np.frombuffer(data + b"\0" * (-len(data) % 4), np.uint32)
