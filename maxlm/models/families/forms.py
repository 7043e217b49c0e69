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

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        stops = np.cumsum([piece.rows for piece in pieces])
        inputs = _inputs(pieces[0])

        def split(whole: Array) -> list[Array]:
            parts = np.split(whole, stops[:-1])
            return [_from_rows(part, piece) for part, piece in zip(parts, pieces, strict=True)]

        def join(parts: Sequence[Array]) -> Array:
            rows = [_to_rows(part, piece) for part, piece in zip(parts, pieces, strict=True)]
            return np.concatenate(rows) if len(rows) > 1 else rows[0]

        return TensorForm((int(stops[-1]), *inputs), split, join)

    return TensorRule(ours, form)


def map_linear(theirs: str, ours: str) -> NameTable:
    """Returns the entries of a linear map with a bias."""
    return {f"{theirs}.weight": linear(f"{ours}.kernel"), f"{theirs}.bias": linear(f"{ours}.bias")}


def map_norm(theirs: str, ours: str) -> NameTable:
    """Returns the entries of a LayerNorm with a bias."""
    return {f"{theirs}.weight": copy(f"{ours}.scale"), f"{theirs}.bias": copy(f"{ours}.bias")}


def transpose(*ours: str) -> TensorRule:
    """Matrices [inputs, outputs] side by side (GPT-2's "Conv1D")."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        upright = linear().form(pieces)
        shape = upright.shape[::-1]
        return TensorForm(shape, lambda x: upright.split(x.T), lambda parts: upright.join(parts).T)

    return TensorRule(ours, form)


def split_grouped_qkv(query: str, key: str, value: str) -> TensorRule:
    """Queries, keys and values fused by kv head: each one's queries, then its key, its value."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        q, k, _ = pieces
        inputs, size = _inputs(q), q.shape[-1]
        heads = k.shape[-2]
        group = q.shape[-2] // heads

        def split(whole: Array) -> list[Array]:
            whole = whole.reshape(heads, group + 2, size, *inputs)
            parts = whole[:, :group], whole[:, group], whole[:, group + 1]
            rows = [part.reshape(-1, *inputs) for part in parts]
            return [_from_rows(part, piece) for part, piece in zip(rows, pieces, strict=True)]

        def join(parts: Sequence[Array]) -> Array:
            rows = [
                _to_rows(part, piece).reshape(heads, -1, size, *inputs)
                for part, piece in zip(parts, pieces, strict=True)
            ]
            return np.concatenate(rows, axis=1).reshape(-1, *inputs)

        return TensorForm((heads * (group + 2) * size, *inputs), split, join)

    return TensorRule((query, key, value), form)


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


def _pairs(size: int) -> Array:
    """Where each dimension that RoPE turns comes from: theirs pairs neighbours, ours halves."""
    return np.arange(size).reshape(-1, 2).T.ravel()


def permute_rotary(rule: TensorRule, rotary_dim: int, *, each_head: bool) -> TensorRule:
    """Returns a map's rows with the last ``rotary_dim`` of each head, or of all, in the order
    that pairs want."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        plain, last = rule.form(pieces), pieces[-1].shape[-1]
        size = last if each_head else plain.shape[0]
        order = np.arange(size)
        order[-rotary_dim:] = size - rotary_dim + _pairs(rotary_dim)
        back = np.argsort(order)

        def ordered(rows: Array, order: Array) -> Array:
            return rows.reshape(-1, size, *rows.shape[1:])[:, order].reshape(rows.shape)

        return TensorForm(
            plain.shape,
            lambda whole: plain.split(ordered(whole, order)),
            lambda parts: ordered(plain.join(parts), back),
        )

    return TensorRule(rule.ours, form)


def split_heads(*ours: str) -> TensorRule:
    """Several maps of one input, each head's rows of them together."""

    def form(pieces: tuple[ParamPiece, ...]) -> TensorForm:
        inputs, heads = pieces[0].shape[0], pieces[0].shape[1]
        sizes = [piece.shape[2] for piece in pieces]
        stops = np.cumsum(sizes)

        def split(whole: Array) -> list[Array]:
            parts = np.split(whole.reshape(heads, -1, inputs), stops[:-1], axis=1)
            return [part.transpose(2, 0, 1) for part in parts]

        def join(parts: Sequence[Array]) -> Array:
            rows = [part.transpose(1, 2, 0) for part in parts]
            return np.concatenate(rows, axis=1).reshape(-1, inputs)

        return TensorForm((heads * int(stops[-1]), inputs), split, join)

    return TensorRule(ours, form)


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


def _inputs(piece: ParamPiece) -> tuple[int, ...]:
    return (prod(piece.shape[: piece.inputs]),) if piece.inputs else ()


def _from_rows(rows: Array, piece: ParamPiece) -> Array:
    return (rows.T if piece.inputs else rows).reshape(piece.shape)


def _to_rows(part: Array, piece: ParamPiece) -> Array:
    if not piece.inputs:
        return part.reshape(-1)
    return part.reshape(*_inputs(piece), piece.rows).T
