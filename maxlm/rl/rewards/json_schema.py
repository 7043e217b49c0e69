"""Answers that have to be JSON of a schema."""

import importlib
import json
from typing import Any, NoReturn

from pydantic import field_validator

from maxlm.config import MaxlmError
from maxlm.rl.rewards.answers import AnswerReward, Extraction
from maxlm.rl.rewards.reward import Scorer, Worker, require_column, require_package
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping


class JsonSchemaReward(AnswerReward):
    """1 for an answer that is JSON and follows a JSON schema (draft 2020-12, or that
    which ``$schema`` names); 0 for others. No address in a schema is fetched."""

    kind: str = "json_schema"
    extract: Extraction = "whole"
    schema_of_all: dict[str, Any] | None = None
    """The schema of all rows; null: each row has its own in ``schema_column``."""
    schema_column: str = "schema"
    """Column of the row's schema, as an object or as text."""

    @field_validator("schema_of_all")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            _check_schema(schema)
        return schema

    @property
    def worker(self) -> Worker:
        # A pattern of a schema can take forever.
        return "process"

    def check_setup(self) -> None:
        require_package("jsonschema", "jsonschema", self.kind)

    def check_row(self, row: JsonMapping) -> None:
        _check_schema(self._read_schema(row))

    def open(self) -> Scorer:
        # Loaded now, for the time limit is that of one score.
        importlib.import_module("jsonschema.validators")
        return self.score

    def score(self, sample: Sample) -> float:
        answer = self.read_answer(sample)
        if answer is None:
            return 0.0
        schema = self._read_schema(sample.prompt.row)
        return float(is_valid_json(answer, schema))

    def _read_schema(self, row: JsonMapping) -> Any:
        if self.schema_of_all is not None:
            return self.schema_of_all
        schema = require_column(row, self.schema_column, "schema_column")
        if not isinstance(schema, str):
            return schema
        try:
            return json.loads(schema)
        except json.JSONDecodeError as error:
            message = f"the column {self.schema_column!r} is no JSON: {error}"
            raise MaxlmError(message, fix="correct the row") from None


def is_valid_json(text: str, schema: Any) -> bool:
    """Tells whether a text is JSON, without NaN and infinities, that follows a
    schema."""
    import referencing
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        validator = validator_for(schema, default=Draft202012Validator)
        # An empty registry: references beyond the schema itself are errors.
        checked = validator(schema, registry=referencing.Registry())
        return checked.is_valid(value)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_schema(schema: Any) -> None:
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
    except ModuleNotFoundError:
        return  # `check_setup` says so.
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        place = "/".join(str(part) for part in error.absolute_path)
        message = f"no JSON schema: {error.message[:200]}"
        message += f" (at {place})" if place else ""
        raise MaxlmError(message, where="schema", fix="correct it") from None
