"""A trained reward model, to score answers with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.conversations import (
    encode_answer,
    encode_conversation,
    get_column,
    read_template_variables,
)
from maxlm.inference.embedding import Embedder
from maxlm.run.load import load_run
from maxlm.runtime.json_types import JsonMapping
from maxlm.sharding import MeshConfig
from maxlm.tasks.reward import SCORE


class RewardModel:
    """A run of task.kind=reward on ``mesh`` (default: one device). Raises MaxlmError: a
    run that is none."""

    def __init__(self, folder: str | Path, *, mesh: MeshConfig | None = None):
        run = load_run(folder, mesh=mesh)
        if SCORE not in run.config.model.heads:
            fix = "name a run of task.kind=reward"
            message = f"no reward model: it has no head {SCORE!r}"
            raise MaxlmError(message, where=str(folder), fix=fix)
        self.folder = str(folder)
        self.max_length = run.config.model.max_seq_len
        self._tokenizer = run.tokenizer
        self._embedder = Embedder(run.model, run.params, run.mesh, self.max_length)

    def encode_row(self, row: JsonMapping) -> list[int]:
        """Returns the tokens of an answer: a prompt and a completion, or messages. An
        answer may be empty: a policy may end at once. Raises MaxlmError: they are more
        than the model reads."""
        variables = read_template_variables(row)
        if "messages" in row:
            encoded = encode_conversation(
                self._tokenizer, row["messages"], variables=variables, allow_empty=True
            )
        else:
            encoded = encode_answer(
                self._tokenizer,
                get_column(row, "prompt"),
                get_column(row, "completion"),
                variables,
                allow_empty=True,
            )
        tokens = encoded.tokens
        if len(tokens) > self.max_length:
            message = f"a text of {len(tokens)} tokens, where the model reads "
            message += f"{self.max_length}"
            fix = "leave it out, or shorten it"
            raise MaxlmError(message, where=self.folder, fix=fix)
        return tokens

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the scores of encoded answers, fp32 [len(rows)]; a higher score is a
        better answer."""
        scores = self._embedder.apply_head(rows, SCORE)
        return scores[:, 0]
