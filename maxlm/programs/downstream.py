"""Tasks that a model is evaluated on while it trains."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.evaluation.curves import (
    compute_gold_probability,
    compute_position_losses,
    draw_downstream,
)
from maxlm.evaluation.results import list_metrics
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.scoring import Scorer
from maxlm.models.architectures import Encoder
from maxlm.plan.layout import place_run
from maxlm.plan.predict import RunPlan
from maxlm.programs.evaluate import import_harness
from maxlm.programs.evaluation import get_eval_params
from maxlm.programs.prepare import PreparedData
from maxlm.programs.setup import RunSetup
from maxlm.train.state import TrainState, param_shardings


class DownstreamEvaluator:
    """Evaluates a run's model on ``train.downstream``'s tasks, on the mesh that it trains on.

    Args:
        on_work: called before each task, and with each request that is done.

    Raises:
        MaxlmError: a task that does not exist, rows that are not there, a model or mesh that cannot
            continue text; before training begins.
    """

    def __init__(self, setup: RunSetup, data: PreparedData, on_work: Callable[[], None]):
        self._setup, self._data, self._on_work = setup, data, on_work
        self._config = config = setup.config.train.downstream
        if not config.tasks and not config.position_documents:
            return
        if isinstance(setup.model, Encoder) or setup.mesh.shape["context"] > 1:
            what = "tasks need a model that continues text, on a mesh with context=1"
            raise MaxlmError(what, where="train.downstream", fix="set its tasks to []")
        if config.tasks:
            self._models, self._harness = import_harness()
            folder = None if config.data is None else Path(config.data)
            self._tasks = self._harness.load_tasks(config.tasks, data=folder, shots=config.shots)
        placed = place_run(
            setup.config, dict(setup.mesh.shape), setup.model.dtype, for_training=False
        )
        self._model = placed.model
        self._shardings = param_shardings(placed.specs, placed.storage, setup.mesh)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Returns a metrics record; {} where nothing is asked for."""
        config, length = self._config, self._setup.config.data.seq_len
        if not config.tasks and not config.position_documents:
            return {}
        params = jax.device_put(get_eval_params(state), self._shardings)
        sizes: Any = {"max_sequences": 32, "max_chunks": 32, "max_length": length}
        engine = Engine(self._model, params, EngineConfig(**sizes), self._data.tokenizer)
        del params
        tokens = int(state.step) * self._setup.config.data.batch_size * length
        record: dict[str, float] = {"tokens": tokens}
        if config.position_documents:
            losses = compute_position_losses(Scorer(engine), self._select_documents())
            record |= {f"eval_loss_at/{end}": loss for end, loss in losses.items()}
        return record | self._evaluate_tasks(engine)

    def plot(self, records: Sequence[Mapping[str, float]], plan: RunPlan, folder: Path) -> None:
        """Draws what was evaluated as ``downstream.png`` in a folder."""
        draw_downstream(records, plan.layout.flops_per_token, folder / "downstream.png")

    def _evaluate_tasks(self, engine: Engine) -> dict[str, float]:
        record: dict[str, float] = {}
        if not self._config.tasks:
            return record
        model = self._models.MaxlmModel(engine)
        model.on_progress = lambda done, total: self._on_work()
        results = self._harness.evaluate_tasks(model, self._tasks, limit=self._config.limit)
        for task, metric, value, *_ in list_metrics(results):
            record[f"downstream/{task}/{metric}"] = value
        for task, samples in results["samples"].items():
            if (probability := compute_gold_probability(samples)) is not None:
                record[f"downstream/{task}/gold_probability"] = probability
        return record

    def _select_documents(self) -> list[list[int]]:
        """The beginnings of the first held-out documents that are long enough."""
        length, wanted = self._setup.config.data.seq_len, self._config.position_documents
        documents = (
            store.text_tokens(index)
            for store in self._data.heldout_stores.values()
            for index in range(store.num_documents)
        )
        found = islice((each for each in documents if len(each) >= length), wanted)
        rows = [each[:length].tolist() for each in found]
        if not rows:
            what = f"no held-out document has {length} tokens (data.seq_len)"
            where = "train.downstream.position_documents"
            raise MaxlmError(what, where=where, fix="set it to 0")
        return rows
