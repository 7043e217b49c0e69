"""Models for lm-evaluation-harness. Texts become tokens, and tokens texts, as in the
harness's own ``HFLM``: scores and generations of the same weights are the same."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM, TemplateLM
from lm_eval.models import utils as model_utils

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.chat import get_chat_template, render_chat
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.evaluation.records import read_json_records
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scoring import MaskedScorer, Scorer
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.runtime.json_types import JsonObject


class MaxlmModel(TemplateLM):
    """Answers the harness's requests with an engine, or a masked model's scorer.

    All processes of a mesh over several hosts are given all requests, and have all
    answers.

    Args:
        tokenizer: default: the engine's.
        max_length: tokens that the model reads at once; default: the engine's longest
            sequence.
        add_bos_token: whether texts open with bos; None: as the tokenizer's documents
            do.
        max_gen_toks: tokens to generate where a task does not say.
        seed: of tasks that sample; each request has a random stream of its own.
    """

    def __init__(
        self,
        engine: Engine | MaskedScorer,
        *,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        self.engine: Engine | None = None
        self.backend = "causal"
        if isinstance(engine, MaskedScorer):
            self._scorer = engine
        else:
            self.engine = engine
            self._scorer = Scorer(engine)
            tokenizer = engine.tokenizer
            max_length = engine.config.max_length
            if isinstance(engine.model, EncoderDecoder):
                self.backend = "seq2seq"
        assert tokenizer is not None, "the harness's texts need a tokenizer"
        assert max_length is not None
        self._codec = tokenizer
        self.max_length = max_length
        """Tokens that the model reads at once; the beginning of a longer text is cut
        off."""
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        """Called with the requests that are done, and all of them."""
        # MaskedScorer adds it itself.
        self._add_bos = False if self.engine is None else add_bos_token
        self._max_gen_toks = max_gen_toks
        self._seed = seed

    eot_token_id = property(lambda self: self._codec.eos_id)
    prefix_token_id = property(lambda self: self._codec.bos_id)
    tokenizer_name = property(lambda self: self._codec.fingerprint)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self._codec.encode(string, allow_special=True)
        if add_special_tokens is None:  # a chat template may have written the prefix
            starts = string.startswith(self._codec.decode([self.prefix_token_id]))
            add_special_tokens = self._add_bos is not False and not starts
        if not add_special_tokens:
            return ids
        prefix = (self._codec.bos_id,) if self._add_bos else self._codec.prefix_ids
        # An encoder's inputs end with eos.
        suffix = (self._codec.eos_id,) if self.backend == "seq2seq" else ()
        return [*prefix, *ids, *suffix]

    def loglikelihood(
        self, requests: Any, disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, tail) for _, context, tail in requests]

        def report(num_done: int) -> None:
            self.on_progress(num_done, len(pairs))

        scores = self._scorer.score(pairs, report)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Any, disable_tqdm: bool = True
    ) -> list[float]:
        windows = []
        owners: list[int] = []
        """The number of the request that each window is of."""
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            totals[number] += logprob
        return totals

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[str]:
        if self.engine is None:
            message = "a masked model names tokens; it does not continue text"
            fix = "choose tasks of multiple choice"
            raise MaxlmError(message, where="generate_until", fix=fix)
        engine_requests = []
        for number, request in enumerate(requests):
            # The harness types them as any tuple.
            arguments: Any = request.args
            context, settings = arguments
            engine_requests.append(self._make_request(number, context, settings))
        tokens: list[list[int]] = [[] for _ in engine_requests]
        num_done = 0
        for output in self.engine.run(engine_requests):
            tokens[int(output.request_id)] += output.token_ids
            if output.finish_reason is not None:
                num_done += 1
            self.on_progress(num_done, len(engine_requests))
        special_ids = set(self._codec.special_tokens.values())
        answers = []
        for engine_request, ids in zip(engine_requests, tokens, strict=True):
            # As transformers does: literals of special tokens may end a text, and are
            # not in it.
            text = self._codec.decode(i for i in ids if i not in special_ids)
            stops = list(engine_request.stop_strings)
            answers.append(model_utils.postprocess_generated_text(text, stops, None))
        return answers

    def _make_request(
        self, number: int, context: str, settings: JsonObject
    ) -> GenerationRequest:
        sampling: JsonObject = dict(
            model_utils.normalize_gen_kwargs(settings, self._max_gen_toks)
        )
        max_new_tokens = sampling.pop("max_gen_toks")
        end_text = self._codec.decode([self.eot_token_id])
        stops = model_utils.handle_stop_sequences(sampling.pop("until"), eos=end_text)
        if not sampling.pop("do_sample", False):
            sampling["temperature"] = 0
        sampling["seed"] = (sampling.get("seed", self._seed) + number) % 2**32
        unknown = sampling.keys() - SamplingConfig.model_fields.keys()
        if unknown:
            message = f"{', '.join(sorted(unknown))}: no setting of sampling here"
            raise MaxlmError(message, where="generation_kwargs", fix="leave it out")
        room = self.max_length
        if self.backend != "seq2seq":  # an encoder reads the prompt alone
            room -= max_new_tokens
        if room < 1:
            message = (
                f"max_gen_toks={max_new_tokens} leaves a prompt no room in "
                f"max_length={self.max_length}"
            )
            fix = "set a larger max_length"
            raise MaxlmError(message, where="generation_kwargs", fix=fix)
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return GenerationRequest(
            str(number),
            tuple(prompt),
            SamplingConfig(**sampling, max_new_tokens=max_new_tokens),
            stop_strings=tuple(filter(None, stops)),
            stop_token_ids=(self.eot_token_id,),
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return get_chat_template(self._codec) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        without_system = [
            message for message in chat_history if message["role"] != "system"
        ]
        try:
            text = render_chat(
                self._codec, chat_history, add_generation_prompt=add_generation_prompt
            )
        except MaxlmError:
            if len(without_system) == len(chat_history):
                raise
            # As HFLM does: some templates refuse a system's message.
            return self.apply_chat_template(without_system, add_generation_prompt)
        if add_generation_prompt:
            return text
        # The last message is the beginning of the answer: what ends its turn is cut
        # off.
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())
        # Blanks at its end stay where the template wrote them.
        ending = last.lstrip()
        if not text.startswith(ending, start):
            ending = last.strip()
        return text[:start] + ending


class AnswerLog(dict[str, Any]):
    """Answers by the hash of their request; each is written to a JSONL file at once."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        if path.exists():
            fields = ("request", "answer")
            for record in read_json_records(path, fields, skip_damaged=True):
                # Not by this class's own method, which would write it once more.
                super().__setitem__(record["request"], record["answer"])

    def __setitem__(self, request: str, answer: Any) -> None:
        if request not in self:
            line = json.dumps({"request": request, "answer": answer})
            with open(self._path, "a", encoding="utf-8") as file:
                # Behind a line break: the line before may be cut short.
                file.write(f"\n{line}")
        super().__setitem__(request, answer)

    def commit(self) -> None:
        """Does nothing: what is set is written."""


class ResumableModel(CachingLM):
    """A model whose answers a file keeps; those that are there are not asked for again.
    (The harness's own class pickles them.)"""

    def __init__(self, lm: LM, path: Path):
        self.lm = lm
        self.cache_db = str(path)
        self.dbdict = AnswerLog(path)
        lm.set_cache_hook(self.get_cache_hook())
