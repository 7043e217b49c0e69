"""Models that continue text."""

from maxlm.config import MaxlmError
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.caches.config import AnyCacheConfig, PagedCacheConfig
from maxlm.models.layers.attention import Attention
from maxlm.models.layers.mlp import Mlp

GenerativeModel = Decoder | EncoderDecoder


def require_generative(model: Model) -> GenerativeModel:
    """Returns the model as one that continues text. Raises MaxlmError: it is none."""
    if isinstance(model, Decoder | EncoderDecoder):
        return model
    message = "an encoder names masked tokens; it does not continue text"
    fix = "use a decoder, or an encoder with a decoder"
    raise MaxlmError(message, where="engine", fix=fix)


def check_batch_invariant(model: GenerativeModel, cache: AnyCacheConfig) -> None:
    """Checks that all sums of a model can have one order (``EngineConfig.
    batch_invariant``); raises MaxlmError."""
    others: list[str] = []
    if not isinstance(model, Decoder):
        others.append("an encoder")
    elif model.config.positions.kind == "relative":
        others.append("learnt biases of positions")
    if not isinstance(cache, PagedCacheConfig):
        others.append(f"a cache of kind {cache.kind}")
    for block in getattr(model, "stacks", {}).values():
        for layer in (block.mixer, block.ffn):
            if layer is not None and not isinstance(layer, Attention | Mlp):
                others.append(layer.name)
    if others:
        names = ", ".join(dict.fromkeys(others))
        message = f"batch_invariant does not cover {names}"
        fix = "set it to false: log-probabilities then differ by rounding alone"
        raise MaxlmError(message, where="batch_invariant", fix=fix)
