"""Answers of a server, kept until an evaluation is done, so that one that is cut off goes on."""

import json
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM

from maxlm.evaluation.records import read_records


class AnswerLog(dict[str, Any]):
    """Answers by the hash of their request; each is written to a JSONL file at once."""

    def __init__(self, path: Path):
        fields = "request", "answer"
        found = read_records(path, fields, skip_damaged=True) if path.exists() else []
        super().__init__((each["request"], each["answer"]) for each in found)
        self._path = path

    def __setitem__(self, request: str, answer: Any) -> None:
        if request not in self:
            line = json.dumps({"request": request, "answer": answer})
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # The line before may be cut short.
        super().__setitem__(request, answer)

    def commit(self) -> None:
        """Does nothing: what is set is written."""


class ResumableModel(CachingLM):
    """A model whose answers a file keeps; those that are there are not asked for again. (The
    harness's own class pickles them.)"""

    def __init__(self, lm: LM, path: Path):
        self.lm, self.cache_db, self.dbdict = lm, str(path), AnswerLog(path)
        lm.set_cache_hook(self.get_cache_hook())
