"""Transforms of parameters: other ways in which a model's parameters are stored, such
as quantized, or beside small trained ones."""

from collections.abc import Sequence

from jax.typing import DTypeLike

from maxlm.config import Config
from maxlm.models.architectures import Model, ModelConfig
from maxlm.models.params import Params, bind_specs, param_specs
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class ParamTransform(Config):
    """A way in which a model's parameters are stored: from declarations to
    declarations. A model has a list of them, applied one after the other: quantized,
    then adapted."""

    def transform_specs(self, specs: Params) -> Params:
        """Returns declarations with a :class:`~maxlm.models.params.Leaf` of
        declarations in place of some."""
        raise NotImplementedError


def build_transformed_model(
    config: ModelConfig,
    transforms: Sequence[ParamTransform],
    *,
    rules: AxisRules,
    dtype: DTypeLike,
    parallel: ParallelConfig = ParallelConfig(),
) -> Model:
    """Builds a model whose parameters are stored as the transforms say, the first of
    them applied first; the keywords are those of ``config.build``."""
    model = config.build(rules=rules, dtype=dtype, parallel=parallel)
    if not transforms:
        return model
    specs = param_specs(model)
    for transform in transforms:
        specs = transform.transform_specs(specs)
    model = bind_specs(model, specs)
    # Adapters of some kinds have a setting of that name.
    virtual_tokens = [
        getattr(transform, "num_virtual_tokens", 0) for transform in transforms
    ]
    model.num_virtual_tokens = sum(virtual_tokens)
    return model
