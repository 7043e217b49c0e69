"""The setting that says in which number formats a model's matrices are stored."""

from collections.abc import Mapping

import jax
from pydantic import Field, field_validator

from maxlm.config import MaxlmError
from maxlm.models.params import (
    Params,
    StoredParam,
    flatten_names,
    get_dense_spec,
    is_leaf,
)
from maxlm.models.targets import find_layer_map_names, find_target_names
from maxlm.models.transforms import ParamTransform
from maxlm.quantization.activations import ActivationRounding
from maxlm.quantization.formats.registry import parse_format
from maxlm.quantization.leaf import QuantizedParam


class QuantizationConfig(ParamTransform):
    """Number formats of matrices."""

    format: str = "nf4-double"
    """Format of the matrices that `formats` does not name, such as `int8`, `int4-g32`,
    `nf4-double` or `fp8`."""
    targets: tuple[str, ...] | None = None
    """Matrices that are quantized, by names such as `query` and `mlp.up` or patterns of
    full names such as `layers.attention.*`; `experts`: those of routed experts;
    `embedding`: the table of tokens; `head`: the output head. null: all linear maps of
    layers, and routed experts."""
    formats: Mapping[str, str] = Field(default_factory=dict)
    """Other formats of some matrices, by their full names or patterns of these; the
    last that matches counts. `none`: the matrix stays as it is."""

    activations: ActivationRounding | None = None
    """What inputs of products with quantized matrices are rounded to, each token by
    itself: `int8` beside the format int8 (W8A8), `fp8` beside fp8, which chips multiply
    as they are. null: they stay in the compute dtype."""

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        parse_format(name)
        return name

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, formats: Mapping[str, str]) -> Mapping[str, str]:
        for name in formats.values():
            if name != "none":
                parse_format(name)
        return formats

    def transform_specs(self, specs: Params) -> Params:
        flat = flatten_names(specs, is_leaf)
        names = self.list_formats(specs)
        stored: list[StoredParam] = []
        for name, spec in flat.items():
            format_name = names.get(name)
            if format_name is None:
                stored.append(spec)
                continue
            try:
                leaf = QuantizedParam.declare(
                    spec, parse_format(format_name), self.activations
                )
            except MaxlmError as error:
                where = f"quantization of {name}"
                raise MaxlmError(error.message, where=where, fix=error.fix) from None
            stored.append(leaf)
        return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_leaf), stored)

    def list_formats(self, specs: Params) -> dict[str, str]:
        """Returns the names of the formats of all parameters that are quantized, by
        their canonical names. Raises MaxlmError: no matrix has a name that a setting
        says."""
        candidates = {}
        for name, stored in flatten_names(specs, is_leaf).items():
            spec = get_dense_spec(stored)
            if spec.contracting_dims or name == "embedding.table":
                candidates[name] = spec
        if self.targets is None:
            chosen = find_layer_map_names(candidates)
            chosen |= {
                name
                for name, spec in candidates.items()
                if "expert" in spec.axes and spec.role == "matrix"
            }
        else:
            chosen = set()
            for target in self.targets:
                chosen.update(
                    find_target_names(candidates, target, "quantization.targets")
                )
        formats = {name: self.format for name in candidates if name in chosen}
        for pattern, format_name in self.formats.items():
            for name in find_target_names(candidates, pattern, "quantization.formats"):
                formats[name] = format_name
        return {
            name: format_name
            for name, format_name in formats.items()
            if format_name != "none"
        }
