"""A published model's config.json, read so that nothing in it is passed over."""

import math
from collections.abc import Mapping
from typing import Any

from maxlm.config import MaxlmError

_REQUIRED = object()

# What says nothing of the maths: names, tokens, how to sample, bookkeeping of the library that
# wrote the file.
_INERT = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class
    _commit_hash _experts_implementation _flash_attn_2_enabled _from_auto _from_model_config
    _model_name_or_path _name_or_path _num_labels _use_flash_attention_2 architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_past output_router_logits output_scores
    pad_token_id prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id use_bfloat16 use_cache
"""
# Matters in training alone, where maxlm has none.
_DROPOUT = """
    activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
    classif_dropout decoder_layerdrop dropout dropout_rate embd_pdrop emb_pdrop encoder_layerdrop
    ffn_pdrop hidden_dropout hidden_dropout_prob resid_pdrop summary_first_dropout
"""
INERT, DROPOUT = frozenset(_INERT.split()), frozenset(_DROPOUT.split())


class Reader:
    """Values of a config.json; each is asked for by name, what is left at the end is refused."""

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str = "config.json",
        tensors: frozenset[str] = frozenset(),
    ):
        self.values, self.where = dict(values), where
        self.tensors = tensors
        """Names of the tensors beside it, where they say what it does not."""
        self._seen: set[str] = set()
        self._inside: dict[str, tuple[Reader, tuple[str, ...]]] = {}

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """A value.

        Raises:
            MaxlmError: it is not there, and has no default.
        """
        self._seen.add(key)
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise MaxlmError(
                f"{key} is missing", where=self.where, fix="take it from the published model"
            )
        return default

    def either(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """The first of several names that is there and not null."""
        found = [self.get(key, None) for key in keys]
        for value in found:
            if value is not None:
                return value
        return self.get(keys[0], default) if default is _REQUIRED else default

    def only(self, key: str, *allowed: Any) -> Any:
        """A value that must be one of those that are implemented, or absent (the first); a null
        means what false and 0 do.

        Raises:
            MaxlmError: it is another.
        """
        value = self.get(key, allowed[0])
        if value is None and not allowed[0]:
            return allowed[0]
        if value not in allowed:
            which = " or ".join(repr(one) for one in allowed)
            raise MaxlmError(
                f"{key}={value!r} is not implemented",
                where=self.where,
                fix=f"only {which} can be converted",
            )
        return value

    def size(self, *keys: str) -> int:
        """A number of things or dimensions, under the first of several names that is there.

        Raises:
            MaxlmError: there is none, or it is no whole number above 0.
        """
        value = self.either(*keys)
        if type(value) is not int or value < 1:
            raise self.wrong(value, "a whole number above 0", *keys)
        return value

    def number(self, key: str, default: float | object = _REQUIRED) -> float:
        """A finite number.

        Raises:
            MaxlmError: there is none.
        """
        value = self.either(key, default=default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(value, "a number", key)
        return float(value)

    def inside(self, key: str, *ignored: str) -> "Reader":
        """A nested mapping, to be finished with this one.

        Args:
            ignored: names in it that say nothing of the maths.

        Raises:
            MaxlmError: it is something else.
        """
        value = self.get(key, None)
        if not isinstance(value, Mapping | None):
            raise self.wrong(value, "a mapping", key)
        found = Reader(value or {}, f"{self.where}: {key}")
        self._inside[key] = found, ignored
        return found

    def wrong(self, value: Any, wanted: str, *keys: str) -> MaxlmError:
        """The error of a value of another kind than ``wanted``, under one of its names."""
        key = next((key for key in keys if self.values.get(key) is not None), keys[0])
        return MaxlmError(
            f"{key}={value!r} is not {wanted}",
            where=self.where,
            fix="take it from the published model",
        )

    def finish(self, *ignored: str) -> list[str]:
        """What is worth telling of what was read.

        Args:
            ignored: further names that say nothing of the maths.

        Raises:
            MaxlmError: a value that nobody asked for; null is none.
        """
        left = self.values.keys() - self._seen - INERT - DROPOUT - {*ignored}
        for key in sorted(key for key in left if self.values[key] is not None):
            raise MaxlmError(
                f"{key}={self.values[key]!r} is not implemented",
                where=self.where,
                fix="convert a model without it; dropping it silently could change the model",
            )
        dropped = {key: self.values.get(key) for key in sorted(DROPOUT)}
        notes = [
            f"{key}={value}: training here has no dropout"
            for key, value in dropped.items()
            if value
        ]
        for key, (nested, names) in self._inside.items():
            notes += [f"{key}.{note}" for note in nested.finish(*names)]
        return notes
