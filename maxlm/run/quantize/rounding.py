"""Quantizes one layer, given what its maps read.

Letters: R outputs and C inputs of a map's matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp

from maxlm.config import MaxlmError
from maxlm.models.params import Params, ParamSpec, flatten_names, is_leaf
from maxlm.quantization.algorithms.awq import AwqConfig, search_channel_scales
from maxlm.quantization.algorithms.gptq import GptqConfig, quantize_gptq
from maxlm.quantization.algorithms.hessian import (
    InputHessian,
    InputMagnitude,
    InputMaximum,
    check_statistic,
    rescale_hessian,
)
from maxlm.quantization.algorithms.rounding import (
    CLIP_RATIOS,
    ScaledFormat,
    round_to_nearest,
)
from maxlm.quantization.algorithms.smoothquant import compute_smoothing_scales
from maxlm.quantization.leaf import MatrixForm, QuantizedParam
from maxlm.run.quantize.folding import Fold, find_folds
from maxlm.run.quantize.layers import CalibratedLayer, LayerWalk, MapNames
from maxlm.run.quantize.scheme import Scheme


@dataclass(frozen=True)
class InputStatistics:
    """What is known of the inputs of maps that read the same, [C] each."""

    hessian: InputHessian | None
    magnitude: InputMagnitude | None
    maximum: InputMaximum | None


@dataclass(frozen=True)
class RoundedLayer:
    """A layer that is quantized."""

    params: Params
    """Dense, with what the codes stand for: the layers behind it are calibrated on what
    it computes."""
    arrays: dict[str, jax.Array]
    """What is stored of it, by the names in the layer: codes and scales of quantized
    matrices, other parameters as they are."""


class LayerQuantizer:
    """Quantizes layers one after the other by one scheme.

    Args:
        forms: of all quantized parameters of the model, by canonical name.
    """

    def __init__(
        self, walk: LayerWalk, scheme: Scheme, forms: Mapping[str, MatrixForm]
    ):
        self.walk = walk
        self.scheme = scheme
        self.forms = forms
        self._folds: dict[tuple[str, int], dict[MapNames, Fold]] = {}

    def quantize(self, layer: CalibratedLayer) -> RoundedLayer:
        """Quantizes a layer whose turn it is, with the statistics of its inputs in
        memory. Raises MaxlmError: inputs that are NaN or infinite."""
        params = self.walk.take_params(layer)
        specs = flatten_names(self.walk.get_specs(layer), is_leaf)
        statistics = self._collect_statistics(layer, params)
        factors: dict[MapNames, jax.Array] = {}
        if self.scheme.algorithm in ("awq", "awq-gptq", "smoothquant"):
            folds = self._find_folds(layer, params, specs, statistics)
            flat = flatten_names(params, is_leaf)
            for readers, fold in folds.items():
                factors[readers] = fold.tie_factors(
                    self._choose_factors(layer, readers, flat, statistics[readers])
                )
            for readers, fold in folds.items():
                params = fold.apply(params, specs, factors[readers])

        hessians: dict[str, jax.Array] = {}
        for readers, statistic in statistics.items():
            if statistic.hessian is None:
                continue
            hessian = statistic.hessian.mean
            if readers in factors:
                hessian = rescale_hessian(hessian, factors[readers])
            hessians |= dict.fromkeys(readers, hessian)
        return self._round(layer, params, hessians)

    def _round(
        self, layer: CalibratedLayer, params: Params, hessians: Mapping[str, jax.Array]
    ) -> RoundedLayer:
        """Rounds a layer's matrices; those whose inputs are not known to the nearest."""
        flat = flatten_names(params, is_leaf)
        arrays: dict[str, jax.Array] = {}
        for name, value in flat.items():
            form = self.forms.get(f"{layer.stack_name}.{name}")
            if form is None:
                arrays[name] = value
                continue
            planes = self._round_matrix(form, value, hessians.get(name))
            leaf = QuantizedParam(planes, form)
            flat[name] = _merge(leaf)
            arrays |= {f"{name}.{plane}": array for plane, array in planes.items()}
        structure = jax.tree.structure(params, is_leaf=is_leaf)
        return RoundedLayer(jax.tree.unflatten(structure, list(flat.values())), arrays)

    def _round_matrix(
        self, form: MatrixForm, value: jax.Array, hessian: jax.Array | None
    ) -> dict[str, jax.Array]:
        is_weighted = self.scheme.algorithm in ("gptq", "awq", "awq-gptq")
        if hessian is None or not is_weighted or form.format != self.scheme.format:
            return _encode(form, value)
        rounding = cast(ScaledFormat, form.format)
        matrix = form.to_matrices(value)
        if self.scheme.algorithm == "awq":
            importance = jnp.diagonal(hessian)
            planes = round_to_nearest(matrix, rounding, importance, CLIP_RATIOS)
        else:
            planes = quantize_gptq(matrix, hessian, rounding, GptqConfig()).planes
        return form.lay_out(planes)

    def _collect_statistics(
        self, layer: CalibratedLayer, params: Params
    ) -> dict[MapNames, InputStatistics]:
        needs_hessian = self.scheme.algorithm in ("gptq", "awq", "awq-gptq")
        needs_magnitude = self.scheme.algorithm in ("awq", "awq-gptq")
        needs_maximum = self.scheme.algorithm == "smoothquant"
        statistics: dict[MapNames, InputStatistics] = {}
        for inputs in self.walk.record(layer, params):
            for readers, x in inputs.items():
                known = statistics.get(readers)
                if known is None:
                    width = x.shape[1]
                    known = InputStatistics(
                        InputHessian.create(width) if needs_hessian else None,
                        InputMagnitude.create(width) if needs_magnitude else None,
                        InputMaximum.create(width) if needs_maximum else None,
                    )
                statistics[readers] = _update(known, x)
        for readers, known in statistics.items():
            name = f"layer {layer.number}: {', '.join(readers)}"
            for statistic in (known.hessian, known.magnitude, known.maximum):
                if statistic is not None:
                    check_statistic(statistic, name)
        return statistics

    def _find_folds(
        self,
        layer: CalibratedLayer,
        params: Params,
        specs: Mapping[str, ParamSpec],
        statistics: Mapping[MapNames, InputStatistics],
    ) -> dict[MapNames, Fold]:
        """Finds folds of a layer, once for all that are alike. SmoothQuant's factors go
        into norms alone."""
        key = (layer.stack_name, layer.place.kind_index)
        if key not in self._folds:
            folds = find_folds(
                lambda params: self.walk.run_first_batch(layer, params),
                params,
                specs,
                statistics,
            )
            if self.scheme.algorithm == "smoothquant":
                folds = {
                    readers: fold
                    for readers, fold in folds.items()
                    if fold.rule != "outputs"
                }
            self._folds[key] = folds
        return self._folds[key]

    def _choose_factors(
        self,
        layer: CalibratedLayer,
        readers: MapNames,
        params: Mapping[str, jax.Array],
        statistics: InputStatistics,
    ) -> jax.Array:
        """Returns the factors [C] of the inputs of maps that read the same."""
        matrices: list[jax.Array] = []
        for name in readers:
            form = self.forms.get(f"{layer.stack_name}.{name}")
            if form is not None and form.format == self.scheme.format:
                matrices.append(form.to_matrices(params[name]))
        if not matrices:  # none is rounded
            (width,) = {len(part) for part in _list_statistics(statistics)}
            return jnp.ones(width, jnp.float32)
        if self.scheme.algorithm == "smoothquant":
            assert statistics.maximum is not None
            return compute_smoothing_scales(matrices, statistics.maximum.maximum)
        assert statistics.hessian is not None
        assert statistics.magnitude is not None
        searched = search_channel_scales(
            matrices,
            statistics.hessian.mean,
            statistics.magnitude.mean,
            cast(ScaledFormat, self.scheme.format),
            AwqConfig(),
        )
        return searched.scales


def check_format(scheme: Scheme) -> None:
    """Checks that an algorithm can choose the codes of a scheme's format. Raises
    MaxlmError."""
    if scheme.is_calibrated and not hasattr(scheme.format, "round_to_codes"):
        message = f"{scheme.algorithm} chooses the codes of integer formats, and "
        message += f"{scheme.format.name} is none"
        fix = f"use {scheme.format.name} alone, or int4-g128"
        raise MaxlmError(message, where="--scheme", fix=fix)


@jax.jit
def _update(known: InputStatistics, x: jax.Array) -> InputStatistics:
    return InputStatistics(
        None if known.hessian is None else known.hessian.update(x),
        None if known.magnitude is None else known.magnitude.update(x),
        None if known.maximum is None else known.maximum.update(x),
    )


jax.tree_util.register_dataclass(InputStatistics)


def _list_statistics(statistics: InputStatistics) -> list[jax.Array]:
    return [part for part in jax.tree.leaves(statistics) if part.ndim]


@jax.jit
def _merge(leaf: QuantizedParam) -> jax.Array:
    return leaf.merge()


def _encode(form: MatrixForm, value: jax.Array) -> dict[str, jax.Array]:
    return jax.jit(form.encode)(value)
