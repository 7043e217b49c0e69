"""A published model's config.json, read so that nothing in it is passed over."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from maxlm.config import MaxlmError

REQUIRED: object = object()
"""The default of a key that must be there."""
MAX_SIZE = 2**53
"""The largest size that is read: a float holds each up to here exactly, so that roots
and ratios of sizes are finite. No model is near it."""
_TAKE_IT = "take it from the published model"

# What says nothing of the maths in any family: names, tokens, how to sample, how sums
# are rounded, how matrices were cut in training, bookkeeping of the library that wrote
# the file.
_INERT = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class
    _commit_hash _experts_implementation _flash_attn_2_enabled _from_auto _from_model_config
    _model_name_or_path _name_or_path _num_labels _use_flash_attention_2 architectures attn_impl
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty max_length min_length model_type n_ctx no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_past
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values reorder_and_upcast_attn repetition_penalty return_dict
    return_dict_in_generate sep_token_id seq_aux slow_but_exact suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id use_bfloat16
    use_cache
"""
# Matters in training alone, where maxlm has none.
_DROPOUT = """
    activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
    classif_dropout decoder_layerdrop dropout dropout_rate embd_pdrop embedding_dropout emb_pdrop
    encoder_layerdrop ffn_pdrop hidden_dropout hidden_dropout_prob layerdrop resid_pdrop
    residual_dropout summary_first_dropout
"""
INERT, DROPOUT = frozenset(_INERT.split()), frozenset(_DROPOUT.split())

T = TypeVar("T")


class ConfigReader:
    """Values of a config.json, each read under its name and checked for its type;
    :meth:`check_all_read` refuses what was not read.

    A default is what the published code of the model type has for an absent key; None:
    nothing, or what another key says. A null counts as absent, but where ``nullable``:
    there it is None.

    Args:
        source: the file's name, for messages.
        tensor_names: names of the tensors beside it, where they say what it does not.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str = "config.json",
        tensor_names: frozenset[str] = frozenset(),
    ):
        self.values = dict(values)
        self.where = source
        self.tensors = tensor_names
        self._seen: set[str] = set()
        self._inside: dict[str, ConfigReader] = {}

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.values.get(key) is not None

    def ignore(self, key: str) -> None:
        """Counts a key as read, whatever it holds: the published code does not read it
        either, or not in this model."""
        self._seen.add(key)

    def _get(
        self, key: str, default: object, *, alias: str = "", nullable: bool = False
    ) -> Any:
        """Reads a value of any type; ``alias`` is another name for it. What leaves this
        class goes through a method that checks the type: a family computes with it."""
        self._seen |= {key, alias or key}
        if alias and self.has(alias):
            value = self.values[alias]
            if self.values.setdefault(key, value) != value:
                message = (
                    f"{key}={self.values[key]!r} and {alias}={value!r} are one setting"
                )
                fix = "keep the value that the model was trained with"
                raise MaxlmError(message, where=self.where, fix=fix)
        if self.has(key):
            return self.values[key]
        if nullable and key in self.values:
            return None
        if default is not REQUIRED:
            return default
        message = f"{key} is {'null' if key in self.values else 'missing'}"
        raise MaxlmError(message, where=self.where, fix=_TAKE_IT)

    def read_implemented(self, key: str, *allowed: object) -> Any:
        """Reads a value that must be one of those implemented, or absent (the first); a
        null means what false and 0 do."""
        self._seen.add(key)
        value = self.values.get(key, allowed[0])
        if value is None and not allowed[0]:
            return allowed[0]
        return self._find_allowed(key, value, allowed)

    def choice(self, key: str, allowed: Iterable[str], default: str) -> str:
        """Reads a name that must be one of those implemented; a null counts as
        absent."""
        return self._find_allowed(key, self._get(key, default), tuple(allowed))

    def _find_allowed(self, key: str, value: object, allowed: Sequence[T]) -> T:
        for candidate in allowed:
            # True is equal to 1, and another setting.
            same_kind = isinstance(value, bool) == isinstance(candidate, bool)
            if value == candidate and same_kind:
                return candidate
        choices = " or ".join(repr(candidate) for candidate in allowed)
        message = f"{key}={value!r} is not implemented"
        fix = f"only {choices} can be converted"
        raise MaxlmError(message, where=self.where, fix=fix)

    def size(
        self,
        key: str,
        default: object = REQUIRED,
        *,
        least: int = 1,
        most: int = MAX_SIZE,
        alias: str = "",
        nullable: bool = False,
    ) -> Any:
        """Reads a number of things or dimensions, at least ``least`` and at most
        ``most``. ``alias`` is another name for it; a null is None if ``nullable``, else
        it counts as absent."""
        value = self._get(key, default, alias=alias, nullable=nullable)
        if value is None:
            return None
        if type(value) is not int or value < least:
            raise self._wrong(key, value, f"a whole number above {least - 1}")
        if value > most:
            raise self._wrong(key, value, f"a whole number up to {most:,}")
        return value

    def number(
        self,
        key: str,
        default: object = REQUIRED,
        *,
        least: int | None = None,
        most: float = sys.float_info.max,
        nullable: bool = False,
    ) -> Any:
        """Reads a finite float of at least ``least``, or above 0, and at most ``most``;
        a null is None if ``nullable``, else it counts as absent."""
        value = self._get(key, default, nullable=nullable)
        if value is None:
            return None
        # Compared before it becomes a float: JSON's integers have no largest.
        if type(value) in (int, float):
            is_above = value > 0 if least is None else value >= least
            if is_above and value <= most:
                return float(value)
        bound = "above 0" if least is None else f"of at least {least}"
        if most < sys.float_info.max:
            bound += f" and at most {most:g}"
        raise self._wrong(key, value, f"a number {bound}")

    def bounds(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        """Reads the smallest and the largest value of something, 0 or more, in order;
        the latter may be infinite."""
        value = self._get(key, list(default))
        numbers: list[float] = []
        for bound in value if isinstance(value, list | tuple) else ():
            # As transformers writes what JSON has no number for.
            if bound == {"__float__": "Infinity"}:
                bound = math.inf
            if type(bound) in (int, float):
                numbers.append(float(bound))
        if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
            raise self._wrong(key, value, "two numbers from 0 on, in order")
        return numbers[0], numbers[1]

    def flag(self, key: str, default: bool) -> bool:
        """Reads true or false; a null is false where that is the default; all else is
        refused."""
        value = self._get(key, default, nullable=True)
        value = False if value is None and not default else value
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def flags(self, key: str) -> list[bool]:
        """Reads a list of true and false, or of ones and zeros; none where it is absent
        or null."""
        values = self._get(key, [])
        if not isinstance(values, list):
            raise self._wrong(key, values, "a list of 0 and 1")
        if not all(type(value) in (bool, int) and value in (0, 1) for value in values):
            raise self._wrong(key, values, "a list of 0 and 1")
        return [bool(value) for value in values]

    def text(self, key: str, default: str, *, alias: str = "") -> str:
        """Reads a name; a null counts as absent."""
        value = self._get(key, default, alias=alias)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a name")
        return value

    def names(self, key: str) -> list[str]:
        """Reads a list of names; none where it is absent or null."""
        values = self._get(key, [])
        if not isinstance(values, list):
            raise self._wrong(key, values, "a list of names")
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, values, "a list of names")
        return values

    def indices(self, key: str, count: int) -> list[int]:
        """Reads numbers of things, from 0 to ``count`` − 1; none where it is absent or
        null."""
        values = self._get(key, [])
        if not isinstance(values, list):
            raise self._wrong(key, values, "a list of numbers")
        if not all(type(value) is int and 0 <= value < count for value in values):
            raise self._wrong(key, values, f"a list of numbers below {count}")
        return values

    def numbers(self, key: str) -> list[float]:
        """Reads a list of numbers above 0."""
        values = self._get(key, REQUIRED)
        is_list = isinstance(values, list)
        if not is_list or not all(
            type(value) in (int, float) and 0 < value <= sys.float_info.max
            for value in values
        ):
            raise self._wrong(key, values, "a list of numbers above 0")
        return [float(value) for value in values]

    def sizes(self, key: str) -> list[int]:
        """Reads a list of numbers of at least 1; none where it is absent or null."""
        values = self._get(key, [])
        if not isinstance(values, list):
            raise self._wrong(key, values, "a list of whole numbers")
        if not all(type(value) is int and value > 0 for value in values):
            raise self._wrong(key, values, "a list of whole numbers above 0")
        return values

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Reads a mapping, of which only its size or its keys may be used; an empty one
        where it is absent or null."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a mapping")
        return value

    def read_nested(self, key: str) -> "ConfigReader":
        """Returns a reader of a nested mapping, to be checked with this one."""
        value = self.mapping(key)
        if key not in self._inside:
            self._inside[key] = ConfigReader(value, f"{self.where}: {key}")
        return self._inside[key]

    def _wrong(self, key: str, value: object, kind: str) -> MaxlmError:
        message = f"{key}={value!r} is not {kind}"
        return MaxlmError(message, where=self.where, fix=_TAKE_IT)

    def check_all_read(self, *ignored: str) -> list[str]:
        """Checks that all but nulls and ``ignored`` names were read; returns notes for
        the user."""
        left = self.values.keys() - self._seen - INERT - DROPOUT - {*ignored}
        for key in sorted(key for key in left if self.values[key] is not None):
            fix = "convert a model without it; dropping it silently could change the model"
            message = f"{key}={self.values[key]!r} is not implemented"
            raise MaxlmError(message, where=self.where, fix=fix)
        notes = [
            f"{key}={self.values[key]}: training here has no dropout"
            for key in sorted(DROPOUT)
            if self.has(key) and self.number(key, least=0)
        ]
        for key, nested in self._inside.items():
            notes += [f"{key}.{note}" for note in nested.check_all_read()]
        return notes
