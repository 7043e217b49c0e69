"""An engine without a model: it says what a test wants, one token a sequence and
step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.outputs import TextStream
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob


class FakeStats(NamedTuple):
    num_running: int
    num_waiting: int
    num_free_pages: int
    prompt_tokens_total: int
    generated_tokens_total: int


@dataclass
class _Sequence:
    request: GenerationRequest
    index: int
    tokens: list[int]
    text: TextStream
    num_sent: int = 0


@dataclass
class FakeEngine:
    """``reply``: the text that follows a prompt's text. A token's log-probability is
    minus its place, from 1; the one in its place, ``a``, has 0.5 less; id 0 is in the
    place of prompts'. Four sequences run at once, and each has one of 100 pages."""

    tokenizer: Tokenizer
    reply: Callable[[str, GenerationRequest], str]
    max_length: int = 2048
    sequences: list[_Sequence] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    before_step: Callable[[], None] = lambda: None
    num_generated: int = 0
    adapters: tuple[str, ...] = ()
    num_programs_left: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def stats(self) -> FakeStats:
        running = self.sequences[:4]
        prompts = [len(request.prompt_tokens) for request in self.requests]
        waiting = len(self.sequences) - len(running)
        return FakeStats(
            len(running), waiting, 100 - len(running), sum(prompts), self.num_generated
        )

    def close(self) -> None:
        """Nothing is compiled behind it."""

    def add_request(self, request: GenerationRequest) -> None:
        if request.grammar is not None and '"nonsense"' in request.grammar.text:
            raise MaxlmError("the schema cannot be compiled", fix="change it")
        assert (
            len(request.prompt_tokens) + request.sampling.max_new_tokens
            <= self.max_length
        )
        assert request.request_id not in {
            sequence.request.request_id for sequence in self.sequences
        }
        self.requests.append(request)
        text = self.reply(self.tokenizer.decode(request.prompt_tokens), request)
        tokens = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
        for index in range(request.num_sequences):
            stream = TextStream(self.tokenizer, request.stop_strings, continued=True)
            self.sequences.append(_Sequence(request, index, tokens, stream))

    def abort(self, request_id: str) -> None:
        self.sequences = [
            s for s in self.sequences if s.request.request_id != request_id
        ]

    def step(self) -> list[SequenceOutput]:
        self.before_step()
        running = self.sequences[:4]
        outputs = [self._advance(sequence) for sequence in running]
        going = [
            s for s, o in zip(running, outputs, strict=True) if not o.finish_reason
        ]
        self.sequences = going + self.sequences[4:]
        return outputs

    def _advance(self, s: _Sequence) -> SequenceOutput:
        request = s.request
        if request.continuations:
            tail = request.continuations[s.index]
            *before, last = (
                TokenLogprob(token_id, -0.5, ((token_id, -0.5),)) for token_id in tail
            )
            ends = {
                "logprobs": [last],
                "prompt_logprobs": before,
                "finish_reason": "length",
            }
            return SequenceOutput(request.request_id, s.index, [tail[-1]], **ends)
        token = s.tokens[s.num_sent]
        s.num_sent += 1
        self.num_generated += 1
        output = SequenceOutput(request.request_id, s.index, [token])
        is_end = token == self.tokenizer.eos_id
        output.text, stopped = s.text.flush() if is_end else s.text.push(token)
        if is_end or stopped:
            output.finish_reason = "stop"
        elif s.num_sent == request.sampling.max_new_tokens:
            output.finish_reason = "length"
            output.text += s.text.flush()[0]
        if request.top_logprobs is not None:
            other = self.tokenizer.encode("a")[0]
            logprob = -1.0 * s.num_sent
            top = ((token, logprob), (other, logprob - 0.5))[: request.top_logprobs]
            output.logprobs = [TokenLogprob(token, logprob, top)]
        if request.prompt_logprobs is not None and s.num_sent == 1:
            output.prompt_logprobs = [
                TokenLogprob(
                    token_id,
                    -0.5,
                    ((token_id, -0.5), (0, -0.75))[: request.prompt_logprobs],
                )
                for token_id in request.prompt_tokens[1:]
            ]
        return output


class FakeEmbedder:
    """Embeds a text by its number of tokens, texts one by one, the last ones first."""

    max_length = 512
    num_done = 0
    before_text: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.compiled: list[tuple[int, ...]] = []

    @staticmethod
    def embed(num_tokens: int) -> np.ndarray:
        return np.array([num_tokens, 1.0, 2.0], np.float32) / np.sqrt(num_tokens**2 + 5)

    def iterate_batches(self, rows, is_shared):
        for index in reversed(range(len(rows))):
            yield [index], np.array([rows[index]]), np.array([len(rows[index])])

    def compile_program(self, shape, pooling):
        self.compiled.append(shape)
        return self.run

    def run(self, tokens, lengths):
        self.before_text()
        self.num_done += 1
        return self.embed(lengths[0])[None]
