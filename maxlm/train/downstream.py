"""A run's scores on tasks, with the engine, while it trains."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.evaluation.curves import compute_gold_probability, compute_position_losses
from maxlm.evaluation.program import import_harness
from maxlm.evaluation.results import list_metrics
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.scoring import Scorer
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.params import drop_auxiliary
from maxlm.optim.state import TrainState, get_eval_params
from maxlm.run.prepare import PreparedData
from maxlm.run.setup import RunSetup


class DownstreamEvaluator:
    """Evaluates a run's model on ``train.downstream``'s tasks, on the mesh that it
    trains on. Raises MaxlmError: a task that does not exist, rows that are not there, a
    model or mesh that cannot continue text; before training begins. ``on_work``: called
    before each task, and with each request that is done."""

    def __init__(
        self, setup: RunSetup, data: PreparedData, on_work: Callable[[], None]
    ):
        self._setup = setup
        self._data = data
        self._on_work = on_work
        config = setup.config.train.downstream
        self._config = config
        if isinstance(setup.model, Encoder) or setup.mesh.shape["context"] > 1:
            message = "tasks need a model that continues text, on a mesh with context=1"
            raise MaxlmError(
                message, where="train.downstream", fix="set its tasks to []"
            )
        if config.tasks:
            self._models, self._harness = import_harness()
            folder = None if config.data is None else Path(config.data)
            self._tasks = self._harness.load_tasks(
                config.tasks, data=folder, shots=config.shots
            )
        self._model, self._shardings = setup.place_to_generate()

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Returns a metrics record."""
        config = self._config
        length = self._setup.config.data.seq_len
        params = jax.device_put(drop_auxiliary(get_eval_params(state)), self._shardings)
        engine_config = EngineConfig(max_sequences=32, max_chunks=32, max_length=length)
        engine = Engine(self._model, params, engine_config, self._data.tokenizer)
        del params  # the engine has parameters of its own
        tokens = int(state.step) * self._setup.config.data.batch_size * length
        record: dict[str, float] = {"tokens": tokens}
        if config.position_documents:
            losses = compute_position_losses(Scorer(engine), self._select_documents())
            record |= {f"eval_loss_at/{end}": loss for end, loss in losses.items()}
        if config.tasks:
            record |= self._evaluate_tasks(engine)
        return record

    def _evaluate_tasks(self, engine: Engine) -> dict[str, float]:
        record: dict[str, float] = {}
        model = self._models.MaxlmModel(engine)
        model.on_progress = lambda done, total: self._on_work()
        results = self._harness.evaluate_tasks(
            model, self._tasks, limit=self._config.limit
        )
        for figure in list_metrics(results):
            record[f"downstream/{figure.task}/{figure.metric}"] = figure.value
        for task, samples in results["samples"].items():
            probability = compute_gold_probability(samples)
            if probability is not None:
                record[f"downstream/{task}/gold_probability"] = probability
        return record

    def _select_documents(self) -> list[list[int]]:
        """Returns the beginnings of the first held-out documents that are long
        enough."""
        length = self._setup.config.data.seq_len
        selected = islice(
            self._read_long_documents(length), self._config.position_documents
        )
        rows = [document[:length].tolist() for document in selected]
        if not rows:
            message = f"no held-out document has {length} tokens (data.seq_len)"
            raise MaxlmError(
                message, where="train.downstream.position_documents", fix="set it to 0"
            )
        return rows

    def _read_long_documents(self, length: int) -> Iterator[np.ndarray]:
        """Yields the held-out documents of ``length`` tokens or more."""
        for store in self._data.heldout_stores.values():
            for index in range(store.num_documents):
                document = store.text_tokens(index)
                if len(document) >= length:
                    yield document
