"""Draws samples with the engine: many episodes together, each as if it were alone.

A sample's random stream follows from the run's seed, its prompt's place in the run's
order and its own number, and a token's from its position besides. So its tokens depend
neither on what else runs, nor on when it was preempted, nor on how often its
episode was cut into requests: a turn that goes on, or a sample that goes on after a
restart, draws what it would have drawn.
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import count

from maxlm.config import MaxlmError
from maxlm.data.loader.permutation import derive_key
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.engine import Engine
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.rl.environments.environment import Environment
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.environment_calls import (
    Answer,
    EnvironmentCalls,
    score_episodes,
)
from maxlm.rl.rollouts.episode import Episode, begin_episode, get_episode_order
from maxlm.rl.rollouts.replies import check_template_keeps_turns, encode_reply
from maxlm.rl.routes import extend_routes
from maxlm.rl.samples import Prompt, Sample
from maxlm.runtime.pool import count_usable_cores


class RolloutSampler:
    """Draws samples for prompts, some dispatches of the engine at a time.

    The parameters may be replaced between two calls (``Engine.set_params``, then
    :meth:`set_version`): samples that are under way go on with the new ones, and know
    which drew each token. The oldest sample goes first, so that long ones do not
    starve.

    On several hosts all processes call every method together, and the environment is
    asked on process 0 alone. An environment whose replies take time is asked in
    threads. On one process the engine goes on meanwhile; on several, where all must run
    the same step, it waits.

    Args:
        engine: with no other requests.
        seed: of the run.
        stream: tells samplers of one run apart, whose samples are to differ.
        max_length: tokens of a sample at most, such as a row to train on has room for;
            None: as many as the engine has.

    Raises:
        MaxlmError: no room for prompts beside the new tokens, or a chat template that
            rewrites turns, in an environment of several.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        environment: Environment,
        config: RolloutConfig,
        *,
        seed: int,
        stream: str = "rollout",
        max_length: int | None = None,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.environment = environment
        self.config = config
        self.seed = seed
        self.stream = stream
        self.version = 0
        self._environment_errors: list[str] = []
        room = find_max_length(engine.config)
        self.max_length = room if max_length is None else min(room, max_length)
        """Tokens of the longest sample."""
        self.max_prompt_length = find_max_prompt_length(config, self.max_length)
        self.max_turns = environment.max_turns
        if config.max_turns is not None:
            self.max_turns = min(self.max_turns, config.max_turns)
        if self.max_turns > 1 and environment.chat:
            check_template_keeps_turns(environment, tokenizer)
        self._room = engine.config.max_sequences * engine.num_shards
        """Sequences that the engine runs together: more would start before turns that
        go on, which are older."""
        self._waiting: list[Episode] = []
        """Episodes to ask the engine to go on with, the oldest first."""
        self._drawing: dict[tuple[str, int], Episode] = {}
        """Episodes in the engine, by request and number in it."""
        threads = config.reply_threads or count_usable_cores()
        self._calls = EnvironmentCalls(environment, threads, config.reply_seconds)
        self._failed: list[Episode] = []
        """Episodes to ask the environment about again."""
        self._over: list[Episode] = []
        """Episodes that are over, to be scored."""
        self._finished: list[Sample] = []
        self._counter = count()

    @property
    def num_unfinished(self) -> int:
        """Samples that are under way."""
        return len(self._list_unfinished())

    def take_environment_errors(self) -> list[str]:
        """Returns what was wrong where the environment failed, since the last call, and
        ``config.environment_errors`` ended the episode."""
        errors = self._environment_errors
        self._environment_errors = []
        return errors

    def set_version(self, step: int) -> None:
        """Says which step's parameters the engine has from now on. Samples that are
        under way go on as ``config.update_in_flight`` says."""
        if step == self.version:
            return
        self.version = step
        if self.config.update_in_flight == "recompute":
            self.pause()

    def pause(self) -> None:
        """Takes the samples that are under way out of the engine, which then may let go
        of its caches; they go on with the next :meth:`advance`, which computes anew
        what is there of them."""
        for (request_id, _), episode in self._drawing.items():
            self.engine.abort(request_id)
            insort(self._waiting, episode, key=get_episode_order)
        self._drawing = {}

    def add(self, prompts: Sequence[Prompt], num_samples: int) -> None:
        """Begins samples 0, 1, ... of each prompt. Raises MaxlmError: a prompt that
        leaves no room for an answer; then none is begun."""
        for prompt in prompts:
            num_tokens = len(prompt.tokens)
            if num_tokens > self.max_prompt_length:
                message = (
                    f"a prompt of {num_tokens:,} tokens, where there is room for "
                    f"{self.max_prompt_length:,}"
                )
                where = f"row {prompt.row_number} of prompts"
                fix = "shorten it, or raise the engine's max_length"
                raise MaxlmError(message, where=where, fix=fix)
        for prompt in prompts:
            for number in range(num_samples):
                self._enqueue(begin_episode(prompt, number))

    def sample(self, prompts: Sequence[Prompt], num_samples: int) -> Iterator[Sample]:
        """Yields samples of each prompt as they finish, until all have."""
        self.add(prompts, num_samples)
        while self.num_unfinished or self._finished:
            yield from self.advance(1)

    def advance(self, max_dispatches: int | None = None) -> list[Sample]:
        """Runs dispatches of the engine, at most so many, or until every sample has
        finished. Returns those that finished meanwhile, in the order in which they did.

        Raises:
            MaxlmError: the environment failed, and ``config.environment_errors`` is
                ``stop``. Nothing is lost: called again, this asks it again.
        """
        for episode in self._failed:
            self._calls.ask(episode)
        self._failed = []
        self._score()
        num_dispatches = 0
        while self.num_unfinished and num_dispatches != max_dispatches:
            self._submit()
            num_dispatches += 1
            for output in self.engine.step(limit_seconds=False):
                self._take(output)
            is_idle = not self._waiting and not self._drawing
            errors = []
            for episode, answer in self._calls.collect(wait_for_any=is_idle):
                error = self._take_answer(episode, answer)
                if error is not None:
                    errors.append(error)
            if errors:
                raise errors[0]
            self._score()
        finished = self._finished
        self._finished = []
        return finished

    def list_unfinished(self) -> list[Episode]:
        """Returns the samples that are under way, the oldest first: what
        :meth:`restore` goes on with. To be called between two calls of
        :meth:`advance`, which change them."""
        return sorted(self._list_unfinished(), key=get_episode_order)

    def _list_unfinished(self) -> list[Episode]:
        return [
            *self._waiting,
            *self._drawing.values(),
            *self._calls.episodes,
            *self._failed,
            *self._over,
        ]

    def restore(self, episodes: Sequence[Episode]) -> None:
        """Goes on with samples that were under way in another process, in this
        order."""
        for episode in episodes:
            episode.order = next(self._counter)
            if episode.is_over:
                self._over.append(episode)
            elif episode.has_ended_turn:
                self._calls.ask(episode)
            else:
                self._waiting.append(episode)

    def _enqueue(self, episode: Episode) -> None:
        episode.order = next(self._counter)
        self._waiting.append(episode)

    def _submit(self) -> None:
        """Gives the engine as many episodes as it runs together, and the others of a
        group: their prompt is computed once."""
        while self._waiting and len(self._drawing) < self._room:
            group = self._take_group()
            request = self._make_request(group)
            self.engine.add_request(request)
            for index, episode in enumerate(group):
                self._drawing[request.request_id, index] = episode

    def _take_group(self) -> list[Episode]:
        """Takes the oldest waiting episode, and where nothing of it is drawn yet, those
        behind it that are the next samples of the same prompt."""
        first = self._waiting[0]
        group = [first]
        for episode in self._waiting[1 : self._room]:
            is_next = (
                not first.has_begun
                and not episode.has_begun
                and episode.sample.prompt.number == first.sample.prompt.number
                and episode.sample.number == first.sample.number + len(group)
            )
            if not is_next:
                break
            group.append(episode)
        del self._waiting[: len(group)]
        return group

    def _make_request(self, group: Sequence[Episode]) -> GenerationRequest:
        episode = group[0]
        sample = episode.sample
        # All samples of a group have one seed, and each a stream of its own; a token's
        # place in the stream is its position, in whatever turn.
        key = derive_key(self.seed, self.stream, sample.prompt.number)
        sampling = self.config.sampling
        num_in_turn = len(sample.tokens) - episode.turn_start
        for member in group:
            member.num_drawn_before = num_in_turn
            member.num_reported_routes = 0
            member.num_requests += 1
        updates = {
            "seed": key % 2**32,
            "max_new_tokens": self._count_room(sample),
            "min_new_tokens": max(0, sampling.min_new_tokens - num_in_turn),
        }
        return GenerationRequest(
            self._make_request_id(episode),
            tuple(sample.tokens),
            sampling.model_copy(update=updates),
            num_sequences=len(group),
            first_stream=sample.number,
            stop_strings=self.environment.stop_strings,
            top_logprobs=0,
            routes=self.engine.config.record_routes,
            # The policy is softmax(logits / temperature), as the trainer has it.
            scales_logprobs=True,
        )

    def _make_request_id(self, episode: Episode) -> str:
        sample = episode.sample
        return (
            f"{self.stream}: prompt {sample.prompt.number}, sample {sample.number}, "
            f"part {episode.num_requests}"
        )

    def _count_room(self, sample: Sample) -> int:
        """Tokens that a sample may still draw."""
        num_left = self.config.sampling.max_new_tokens - sample.num_sampled
        return min(num_left, self.max_length - len(sample.tokens))

    def _take(self, output: SequenceOutput) -> None:
        """Adds tokens that were drawn to their sample."""
        name = (output.request_id, output.sequence_index)
        episode = self._drawing.get(name)
        if episode is None:
            return
        sample = episode.sample
        finish_reason = output.finish_reason
        num_tokens = len(output.token_ids)
        num_until_stop = self._count_until_stop(episode, output)
        if num_until_stop is not None:
            self.engine.abort(output.request_id)
            num_tokens = num_until_stop
            finish_reason = "stop"
        sample.tokens += output.token_ids[:num_tokens]
        sample.is_sampled += [True] * num_tokens
        sample.log_probs += [token.logprob for token in output.logprobs[:num_tokens]]
        sample.versions += [self.version] * num_tokens
        if output.routes is not None:
            extend_routes(sample, output.routes, episode.num_reported_routes)
            episode.num_reported_routes += len(output.routes)
        if finish_reason is None:
            return
        del self._drawing[name]
        turn = sample.tokens[episode.turn_start :]
        if turn[-1] in self.tokenizer.stop_ids:
            turn = turn[:-1]
        sample.turns.append(("assistant", self._decode(turn)))
        sample.is_complete = finish_reason == "stop"
        has_turns_left = episode.num_policy_turns < self.max_turns
        if sample.is_complete and has_turns_left:
            episode.has_ended_turn = True
            self._calls.ask(episode)
        else:
            self._end(episode)

    def _count_until_stop(self, episode: Episode, output: SequenceOutput) -> int | None:
        """Counts an output's tokens up to a stop string that begins in what was drawn
        before a restart, which the engine does not look at; None: there is none."""
        stop_strings = self.environment.stop_strings
        num_before = episode.num_drawn_before
        if not num_before or not stop_strings:
            return None
        turn = episode.sample.tokens[episode.turn_start :]
        for count_until in range(1, len(output.token_ids) + 1):
            text = self._decode(turn + output.token_ids[:count_until])
            if any(stop in text for stop in stop_strings):
                return count_until
        return None

    def _decode(self, turn: Sequence[int]) -> str:
        """The text of a turn."""
        text = self.tokenizer.decode_bytes(turn, continued=True)
        return text.decode("utf-8", "replace")

    def _take_answer(self, episode: Episode, answer: Answer) -> MaxlmError | None:
        """Goes on with an episode as its environment says. Returns an error that ends
        the run; the episode is then asked about again."""
        sample = episode.sample
        if answer is None:
            self._end(episode)
            return None
        if isinstance(answer, MaxlmError):
            return self._take_error(episode, answer)
        try:
            tokens = encode_reply(self.environment, self.tokenizer, sample, answer)
        except MaxlmError as error:
            return self._take_error(episode, error)
        has_room = len(sample.tokens) + len(tokens) < self.max_length
        if not has_room or self._count_room(sample) < 1:
            # The policy has no room to go on: what it would have read does not matter.
            sample.is_complete = False
            self._end(episode)
            return None
        sample.tokens += tokens
        sample.is_sampled += [False] * len(tokens)
        sample.log_probs += [0.0] * len(tokens)
        sample.versions += [-1] * len(tokens)
        sample.turns.append((answer.role, answer.text))
        sample.is_complete = False
        episode.turn_start = len(sample.tokens)
        episode.has_ended_turn = False
        insort(self._waiting, episode, key=get_episode_order)
        return None

    def _take_error(self, episode: Episode, error: MaxlmError) -> MaxlmError | None:
        """Ends an episode with which the environment failed, or returns the error that
        ends the run."""
        if self.config.environment_errors == "stop":
            self._failed.append(episode)
            return error
        self._environment_errors.append(str(error))
        episode.sample.is_complete = False
        self._end(episode)
        return None

    def _end(self, episode: Episode) -> None:
        episode.is_over = True
        self._over.append(episode)

    def _score(self) -> None:
        """Lets the environment score the episodes that are over. Raises MaxlmError: it
        failed, and ``config.environment_errors`` is ``stop``."""
        for error in score_episodes(self.environment, self._over):
            if error is not None:
                if self.config.environment_errors == "stop":
                    raise error
                self._environment_errors.append(str(error))
            episode = self._over.pop(0)
            self._finished.append(episode.sample)


def find_max_length(config: EngineConfig) -> int:
    """Returns how many tokens the longest sequence of an engine may have, by its length
    and by its pages."""
    if config.num_pages is None:
        return config.max_length
    # One page is padding, and the last token of a sequence is never read.
    num_in_pages = (config.num_pages - 1) * config.page_size + 1
    return min(config.max_length, num_in_pages)


def find_max_prompt_length(config: RolloutConfig, max_length: int) -> int:
    """Returns how many tokens a prompt may have, where a sequence may have
    ``max_length``. Raises MaxlmError: the settings leave no room for the answer."""
    max_new_tokens = config.sampling.max_new_tokens
    room = max_length - max_new_tokens
    if room < (config.max_prompt_length or 1):
        prompts = f"max_prompt_length={config.max_prompt_length}"
        if config.max_prompt_length is None:
            prompts = "a prompt"
        message = f"{max_new_tokens:,} leave no room for {prompts} in the "
        message += f"{max_length:,} tokens of the longest sequence"
        fix = "raise data.seq_len (and task.engine.max_length, if it is set), or lower "
        fix += "max_new_tokens or max_prompt_length"
        where = "task.rollouts.sampling.max_new_tokens"
        raise MaxlmError(message, where=where, fix=fix)
    return config.max_prompt_length or room
