"""Special tokens that a tokenizer does not have yet."""

import json
from collections.abc import Sequence
from dataclasses import replace

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.huggingface import HuggingFaceCodec


def extend_tokenizer(tokenizer: Tokenizer, literals: Sequence[str]) -> Tokenizer:
    """Returns a tokenizer with more special tokens, whose ids follow its own; those
    that it has keep theirs. Raises MaxlmError: a SentencePiece model, which holds its
    tokens in a form that is not written here."""
    new = [
        literal
        for literal in dict.fromkeys(literals)
        if literal not in tokenizer.special.ids
    ]
    if not new:
        return tokenizer
    codec = tokenizer.codec
    if not isinstance(codec, HuggingFaceCodec):
        message = (
            f"a tokenizer of kind {tokenizer.kind} gets no special tokens, such as "
            f"{new[0]}"
        )
        fix = (
            "let transformers write its tokenizer.json, and import that (maxlm "
            "tokenizer import)"
        )
        raise MaxlmError(message, where="tokenizer.extra_special_tokens", fix=fix)
    # Some are in the vocabulary already, as ordinary tokens: they keep their ids, and
    # come first in the file.
    vocab = codec.get_vocab()
    new_ids = {literal: vocab[literal] for literal in new if literal in vocab}
    next_id = tokenizer.vocab_size
    for literal in new:
        if literal not in vocab:
            new_ids[literal] = next_id
            next_id += 1
    spec = json.loads(codec.known_data)
    for literal, token_id in new_ids.items():
        token = {
            "id": token_id,
            "content": literal,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        spec.setdefault("added_tokens", []).append(token)
    special_ids = {**tokenizer.special.ids, **new_ids}
    data = json.dumps(spec, ensure_ascii=False).encode()
    is_own = tokenizer.kind == "bpe"
    return Tokenizer(
        tokenizer.kind,
        HuggingFaceCodec(data, special_ids, splits_by_pattern=is_own),
        replace(tokenizer.special, ids=special_ids),
        opens_with_bos=tokenizer.opens_with_bos,
        extra_stop_ids=tokenizer.extra_stop_ids,
        extra_files=tokenizer.extra_files,
    )
