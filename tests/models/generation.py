"""What the engine generates, beside the full forward pass over the same text."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import Params, bind

NEW_TOKENS = 8
TEXT_LENGTH = 32
"""Places of a row of text, for prompts of up to 24 tokens."""
# More prompts than rows, so that rows are used again; chunks that end anywhere, also
# before a convolution's width.
ENGINE = EngineConfig(
    max_sequences=2,
    max_length=TEXT_LENGTH,
    prefill_tokens=8,
    page_size=4,
    decode_steps=3,
)


def check_generation_equals_forward_pass(
    model: Decoder, params: Params, prompt_lengths: Sequence[int], num_rows: int = 1
) -> None:
    """Asserts that greedy tokens of the engine, with their log-probabilities, are those
    of the full forward pass within 1e-5. The mesh is the one that is set.

    Args:
        prompt_lengths: of random prompts.
        num_rows: rows of the forward pass's batch, such as a mesh divides; the text is
            in the first.
    """
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, model.config.vocab_size, length).tolist()
        for length in prompt_lengths
    ]
    engine = Engine(model, params, ENGINE)
    greedy = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    requests = [
        GenerationRequest(str(number), tuple(prompt), greedy, top_logprobs=0)
        for number, prompt in enumerate(prompts)
    ]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    logprobs: dict[str, list[float]] = {request.request_id: [] for request in requests}
    for output in engine.run(requests):
        tokens[output.request_id] += output.token_ids
        logprobs[output.request_id] += [one.logprob for one in output.logprobs]

    @jax.jit
    def read(params: Params, text: np.ndarray) -> jax.Array:
        bound = bind(model, params)
        places = jnp.broadcast_to(jnp.arange(TEXT_LENGTH, dtype=jnp.int32), text.shape)
        return jax.nn.log_softmax(bound.logits(bound(text, places)[0]))

    for request, prompt in zip(requests, prompts, strict=True):
        generated = tokens[request.request_id]
        assert len(generated) == NEW_TOKENS
        text = np.zeros((num_rows, TEXT_LENGTH), np.int32)
        text[0, : len(prompt) + NEW_TOKENS] = [*prompt, *generated]
        expected = np.asarray(read(params, text))[0, len(prompt) - 1 :][:NEW_TOKENS]
        assert expected.argmax(-1).tolist() == generated
        np.testing.assert_allclose(
            logprobs[request.request_id], expected.max(-1), rtol=0, atol=1e-5
        )
