"""Special tokens that a tokenizer does not have yet."""

import json
from collections.abc import Sequence

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import SpecialTokens, Tokenizer
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
        problem = f"a tokenizer of kind {tokenizer.kind} gets no special tokens, such as {new[0]}"
        fix = "let transformers write its tokenizer.json, and import that (maxlm tokenizer import)"
        raise MaxlmError(problem, where="tokenizer.extra_special_tokens", fix=fix)
    # Some are in the vocabulary already, as ordinary tokens.
    vocab = codec.get_vocab()
    added = [literal for literal in new if literal not in vocab]
    ids = {literal: vocab[literal] for literal in new if literal in vocab}
    ids |= {
        literal: tokenizer.vocab_size + number for number, literal in enumerate(added)
    }
    spec = json.loads(codec.known_data)
    for literal, token_id in ids.items():
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": token_id, "content": literal, **flags, "special": True}
        spec.setdefault("added_tokens", []).append(token)
    special = {**tokenizer.special.ids, **ids}
    data = json.dumps(spec, ensure_ascii=False).encode()
    return Tokenizer(
        tokenizer.kind,
        HuggingFaceCodec(data, special, splits_by_pattern=tokenizer.kind == "bpe"),
        SpecialTokens(
            special, tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad
        ),
        opens_with_bos=tokenizer.opens_with_bos,
        extra_stop_ids=tokenizer.extra_stop_ids,
        extra_files=tokenizer.extra_files,
    )
