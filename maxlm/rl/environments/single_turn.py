"""Prompts from files, each with one answer of the policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.row_files import RowFiles, open_rows
from maxlm.rl.environments.environment import Environment, PromptRows
from maxlm.runtime.json_types import JsonObject


@dataclass(frozen=True)
class FileRows:
    """The rows of files."""

    files: RowFiles

    @property
    def num_rows(self) -> int:
        return len(self.files)

    def __getitem__(self, row_number: int, /) -> JsonObject:
        return self.files[row_number]

    def locate(self, row_number: int, /) -> str:
        return self.files.locate(row_number)


class SingleTurnEnvironment(Environment):
    """Prompts of files: ``prompt``, text or a list of messages, or ``messages``, whose
    last answer is left out. All columns of a row are there for rewards."""

    needs_files = True

    kind: str = "single_turn"
    files: tuple[LocalPath, ...] = ()
    """Files of prompts: .jsonl (also .gz, .zst), .parquet, folders that `datasets`
    saved."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """Names of columns in the files, by the names that environments and rewards read:
    {prompt: question, answer: solution}."""

    def check_files(self, setting: str, example: str) -> None:
        if self.needs_files and not self.files:
            message = f"environment.kind={self.kind} reads prompts of files, and none "
            message += "is named"
            fix = f"name a .jsonl or .parquet file: {example}"
            raise MaxlmError(message, where=setting, fix=fix)
        for file in self.files:
            if not Path(file).exists():
                fix = (
                    f"name a .jsonl or .parquet file, or a dataset's folder: {example}"
                )
                raise MaxlmError("no such file", where=f"{setting}, {file}", fix=fix)

    def open_prompts(self, seed: int) -> PromptRows:
        self.check_files("environment.files", "files=[FILE]")
        return FileRows(open_rows(*self.files, columns=self.columns))
