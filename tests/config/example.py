"""A small run's config, to load and to make mistakes in."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maxlm.config import Config, MaxlmError


class Model(Config):
    d_model: int = Field(8, gt=0)
    num_heads: int = 4
    num_kv_heads: int = 4
    activation: Literal["silu", "gelu"] = "silu"
    bias: bool = False

    @model_validator(mode="after")
    def _check(self):
        if self.num_heads % self.num_kv_heads:
            message = (
                f"num_heads={self.num_heads} is not divisible by {self.num_kv_heads}"
            )
            raise MaxlmError(message, fix="choose a divisor")
        return self


class Adamw(Config):
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)


class Lion(Config):
    kind: Literal["lion"]
    beta: float = 0.9


class Source(Config):
    path: str
    weight: float = 1.0


class Data(Config):
    seq_len: int = 16
    sources: list[Source] = Field([])
    workers: int | Literal["auto"] = "auto"

    @field_validator("seq_len")
    @classmethod
    def _check(cls, value: int) -> int:
        if value % 8:
            raise ValueError(f"seq_len={value} is not a multiple of 8")
        return value


class Mesh(Config):
    data: int = 1
    fsdp: int = 1


class Run(Config):
    name: str = "x"
    model: Model = Model()
    optimizer: Annotated[Adamw | Lion, Field(discriminator="kind")] = Adamw()
    data: Data = Data()
    mesh: Mesh = Mesh()
    labels: list[str] = Field([])
    extra: dict[str, int] = Field({})
    share: float = 0.5
    out: Path | None = None

    @field_validator("mesh", mode="before")
    @classmethod
    def _parse(cls, value):
        if isinstance(value, str):
            return {
                k: int(v) for k, v in (part.split("=") for part in value.split(","))
            }
        return value

    @model_validator(mode="after")
    def _check(self):
        if self.data.seq_len > 1000:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is too long for {self.name}"
            )
        if self.name == "raise":
            raise MaxlmError("no such thing", where="tokenizer/vocab.json")
        return self
