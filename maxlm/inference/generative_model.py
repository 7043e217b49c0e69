"""Models that continue text."""

from maxlm.config import MaxlmError
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.transformer import Decoder

GenerativeModel = Decoder | EncoderDecoder


def require_generative(model: Model) -> GenerativeModel:
    """Returns the model as one that continues text. Raises MaxlmError: it is none."""
    if isinstance(model, Decoder | EncoderDecoder):
        return model
    message = "an encoder names masked tokens; it does not continue text"
    fix = "use a decoder, or an encoder with a decoder"
    raise MaxlmError(message, where="engine", fix=fix)
