"""Vectors that another model has computed, as inputs: an image encoder's features, or
embeddings of tokens themselves."""

from collections.abc import Mapping
from typing import Literal

import jax
from flax import nnx
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.frontends.frontend import (
    FrontendConfig,
    ItemArraySpec,
    RegisteredFrontend,
)
from maxlm.models.layers.linear import Linear


class EmbeddingsConfig(FrontendConfig):
    """Reads one array, ``embeddings``: a vector an item."""

    kind: Literal["embeddings"] = "embeddings"
    width: int = Field(gt=0)
    """Length of the vectors."""
    project: bool = True
    """Map them into the model's width with a learned matrix; false: they have the
    model's width, and stand as they are."""

    def item_arrays(self) -> Mapping[str, ItemArraySpec]:
        return {"embeddings": ItemArraySpec((self.width,))}


class Embeddings(nnx.Module):
    """``projection(embeddings)``, or the embeddings themselves."""

    def __init__(self, config: EmbeddingsConfig, context: BuildContext):
        self.dtype = context.dtype
        outputs = {"embed": context.d_model}
        self.projection = (
            Linear({None: config.width}, outputs, context, bias=False)
            if config.project
            else None
        )
        if not config.project and config.width != context.d_model:
            raise MaxlmError(
                f"vectors of width={config.width} for model.d_model={context.d_model}",
                where="model.frontend",
                fix=f"set project=true, or width={context.d_model}",
            )

    def encode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        embeddings = arrays["embeddings"].astype(self.dtype)
        if self.projection is None:
            return embeddings
        return self.projection(embeddings, seq_axis=None)


EMBEDDINGS = RegisteredFrontend(EmbeddingsConfig, Embeddings)
