"""The words of name tables: rules by which one of their tensors is made of our parameters."""

from collections.abc import Sequence
from math import prod

import numpy as np

from maxlm.models.families.names import Array, NameTable, ParamPiece, TensorForm, TensorRule

QKV = ("attention.query", "attention.key", "attention.value")
QKV_KERNELS = tuple(f"{name}.kernel" for name in QKV)
QKV_BIASES = tuple(f"{name}.bias" for name in QKV)


def linear(*ours: str) -> TensorRule:
    """Matrices [outputs, inputs] as torch has them, several one above the other; or their biases,
    end to end."""
    return TensorRule(ours, lambda pieces: _stack_rows(pieces, 1))


def split_heads(*ours: str) -> TensorRule:
    """Several maps of one input, fused by kv head: each one's rows of them together, for queries
    those of all heads that it serves."""
    return TensorRule(ours, lambda pieces: _stack_rows(pieces, pieces[1].shape[-2]))


def _stack_rows(pieces: tuple[ParamPiece, ...], groups: int) -> TensorForm:
    """Each of ``groups`` equal parts of the rows has all pieces, one above the other."""
    first = pieces[0]
    inputs = (prod(first.shape[: first.inputs]),) if first.inputs else ()
    stops = np.cumsum([piece.rows // groups for piece in pieces])

    def split(whole: Array) -> list[Array]:
        parts = np.split(whole.reshape(groups, -1, *inputs), stops[:-1], axis=1)
        rows = (part.reshape(-1, *inputs) for part in parts)
        return [own.T.reshape(piece.shape) for own, piece in zip(rows, pieces, strict=True)]

    def join(parts: Sequence[Array]) -> Array:
        rows = [part.reshape(*inputs, -1).T.reshape(groups, -1, *inputs) for part in parts]
        joined = np.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]
        return joined.reshape(-1, *inputs)

    return TensorForm((groups * int(stops[-1]), *inputs), split, join)


def map_linear(theirs: str, ours: str) -> NameTable:
    """Returns the entries of a linear map with a bias."""
    return {f"{theirs}.weight": linear(f"{ours}.kernel"), f"{theirs}.bias": linear(f"{ours}.bias")}


def map_linears(theirs: str, ours: str, **names: str) -> NameTable:
    """Returns the entries of a module's linear maps, whose names there are keywords."""
    found: dict[str, TensorRule] = {}
    for there, here in names.items():
        found |= map_linear(f"{theirs}.{there}", f"{ours}.{here}")
    return found


def map_norm(theirs: str, ours: str) -> NameTable:
    """Returns the entries of a LayerNorm with a bias."""
    return {f"{theirs}.weight": copy(f"{ours}.scale"), f"{theirs}.bias": copy(f"{ours}.bias")}


def transpose(*ours: str) -> TensorRule:
    """Matrices [inputs, outputs] side by side (GPT-2's "Conv1D")."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        shape, split, join = _stack_rows(pieces, 1)
        return TensorForm(shape[::-1], lambda x: split(x.T), lambda parts: join(parts).T)

    return TensorRule(ours, form)


def copy(ours: str, *aliases: str) -> TensorRule:
    """Returns a table or a vector as it is."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        return TensorForm(pieces[0].shape, lambda x: [x], lambda parts: parts[0])

    return TensorRule((ours,), form, aliases)


def take_row(ours: str) -> TensorRule:
    """Returns a vector as a matrix of one row."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        shape = (1, *pieces[0].shape)
        return TensorForm(shape, lambda x: [x[0]], lambda parts: parts[0][None])

    return TensorRule((ours,), form)


def permute_rotary(rule: TensorRule, rotary_dim: int, *, each_head: bool) -> TensorRule:
    """Returns a map's rows with the last ``rotary_dim`` of each head, or of all, in the order that
    pairs want: theirs pairs neighbours, ours halves."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        plain, last = rule.form(pieces), pieces[-1].shape[-1]
        size = last if each_head else plain.shape[0]
        order = np.arange(size)
        order[-rotary_dim:] = order[-rotary_dim:].reshape(-1, 2).T.ravel()
        back = np.argsort(order)

        def ordered(rows: Array, order: Array) -> Array:
            return rows.reshape(-1, size, *rows.shape[1:])[:, order].reshape(rows.shape)

        return TensorForm(
            plain.shape,
            lambda whole: plain.split(ordered(whole, order)),
            lambda parts: ordered(plain.join(parts), back),
        )

    return TensorRule(rule.ours, form)


def unstack_experts(ours: str, *, same_orientation: bool) -> TensorRule:
    """Returns all experts' matrices, one above the other, each [d_ff, D]; ours are [E, d_ff, D] too
    or, of another orientation, [E, D, d_ff]."""
    axes = (0, 1, 2) if same_orientation else (0, 2, 1)

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        e, d_ff, d = (pieces[0].shape[axis] for axis in axes)
        return TensorForm(
            (e * d_ff, d),
            lambda whole: [whole.reshape(e, d_ff, d).transpose(axes)],
            lambda parts: parts[0].transpose(axes).reshape(e * d_ff, d),
        )

    return TensorRule((ours,), form)
