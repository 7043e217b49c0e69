"""A published model's config.json, read so that nothing in it is passed over."""

from collections.abc import Mapping
from typing import Any

from maxlm.config import MaxlmError

_REQUIRED = object()

# What says nothing of the maths: names, tokens, bookkeeping of the library that wrote the file.
_INERT = """
    architectures
    attn_implementation auto_map begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id dtype early_stopping eos_token_id
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beams output_attentions output_hidden_states output_past
    output_router_logits pad_token_id prefix problem_type pruned_heads return_dict sep_token_id
    suppress_tokens task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_bfloat16 use_cache
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
        """A value that must be one of those that are implemented, or absent (the first).

        Raises:
            MaxlmError: it is another.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            which = " or ".join(repr(one) for one in allowed)
            raise MaxlmError(
                f"{key}={value!r} is not implemented",
                where=self.where,
                fix=f"only {which} can be converted",
            )
        return value

    def inside(self, key: str) -> "Reader":
        """A nested mapping."""
        return Reader(self.get(key, None) or {}, f"{self.where}: {key}")

    def finish(self, *ignored: str) -> list[str]:
        """What is worth telling of what was read.

        Args:
            ignored: further names that say nothing of the maths.

        Raises:
            MaxlmError: a value that nobody asked for.
        """
        left = self.values.keys() - self._seen - INERT - DROPOUT - {*ignored}
        for key in sorted(key for key in left if not key.startswith("_")):
            raise MaxlmError(
                f"{key}={self.values[key]!r} is not implemented",
                where=self.where,
                fix="convert a model without it; dropping it silently could change the model",
            )
        dropped = {key: self.values.get(key) for key in sorted(DROPOUT)}
        return [
            f"{key}={value}: training here has no dropout"
            for key, value in dropped.items()
            if value
        ]
