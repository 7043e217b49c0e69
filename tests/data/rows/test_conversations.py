"""Which tokens of a conversation are learnt: by role and turn, with each kind of
template; and rows that are refused in one line."""

import inspect
import pickle
import textwrap
from functools import cache, partial

import pytest

from maxlm.config import MaxlmError
from maxlm.data.conversations import (
    encode_answer,
    encode_conversation,
    encode_pair,
    get_column,
    get_label,
)
from maxlm.data.tokenizer.chat import add_chat_template, encode_chat
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer

pytest.importorskip("jinja2")

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    SYSTEM,
    {"role": "user", "content": "What is 2 + 2? <|im_end|>"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "größer?"},
    {"role": "assistant", "content": "\n  Yes, <|im_end|> größer. <"},
]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# As Qwen 3 does with thoughts: turns before the last question lose something.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == "
    "'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def train_once(kind, chat):
    eos = "<|im_end|>" if chat == "chatml" else "<|endoftext|>"
    config = TokenizerConfig(kind=kind, vocab_size=600, chat=chat, eos=eos)
    texts = [
        inspect.getsource(textwrap),
        "What is größer than 2? Be brief, yes.\n" * 20,
    ]
    return pickle.dumps(train_tokenizer(config, texts))


def train(kind="bpe", chat="chatml", template=None):
    tokenizer = pickle.loads(train_once(kind, chat))
    if template:
        tokenizer.extra_files["chat_template.jinja"] = template.encode()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train()


def learnt_texts(tokenizer, encoded):
    """The text of each run of learnt tokens."""
    texts, run = [], []
    for token, is_target in [*zip(*encoded, strict=True), (None, False)]:
        if is_target:
            run.append(token)
        elif run:
            texts, run = (
                [*texts, tokenizer.decode_bytes(run, continued=True).decode()],
                [],
            )
    return texts


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_unigram"])
@pytest.mark.parametrize(
    ("chat", "end", "answer"),
    [
        ("chatml", "<|im_end|>", "\n  Yes, <|im_end|> größer. <"),
        ("llama3", "<|eot_id|>", "Yes, <|im_end|> größer. <"),  # it trims
    ],
)
def test_answers_are_learnt_to_the_token_that_ends_the_turn(kind, chat, end, answer):
    tokenizer = train(kind, chat)
    encoded = encode_conversation(tokenizer, TALK)
    assert learnt_texts(tokenizer, encoded) == [f"4{end}", f"{answer}{end}"]
    assert tokenizer.decode(encoded.tokens) == tokenizer.decode(
        encode_chat(tokenizer, TALK)
    )
    # What the model reads before it answers is what it is asked with.
    first = encoded.is_target.index(True)
    assert encoded.tokens[:first] == encode_chat(
        tokenizer, TALK[:2], add_generation_prompt=True
    )
    ends = [i for i, t in enumerate(encoded.tokens) if t == tokenizer.special.ids[end]]
    assert [encoded.is_target[i] for i in ends] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"turns": "last"}, ["\n  Yes, <|im_end|> größer. <<|im_end|>"]),
        ({"num_prompt_messages": 3}, ["\n  Yes, <|im_end|> größer. <<|im_end|>"]),
        (
            {"roles": ("user",), "turns": "last"},
            ["<|im_start|>user\ngrößer?<|im_end|>"],
        ),
        ({"roles": ("system",)}, ["<|im_start|>system\nBe brief.<|im_end|>"]),
    ],
)
def test_turns_and_roles_are_chosen(tokenizer, options, want):
    encoded = encode_conversation(tokenizer, TALK, **options)
    assert learnt_texts(tokenizer, encoded) == want
    assert tokenizer.decode(encoded.tokens) == tokenizer.decode(
        encode_chat(tokenizer, TALK)
    )


def test_a_message_is_left_out_by_train_false_and_null_says_nothing(tokenizer):
    talk = [{**message, "train": None} for message in TALK]
    assert encode_conversation(tokenizer, talk) == encode_conversation(tokenizer, TALK)
    talk[4]["train"] = False
    assert learnt_texts(tokenizer, encode_conversation(tokenizer, talk)) == [
        "4<|im_end|>"
    ]


def test_generation_marks_say_what_is_learnt():
    tokenizer = train(template=MARKED)
    encoded = encode_conversation(tokenizer, TALK)
    want = ["4<|im_end|>\n", "\n  Yes, <|im_end|> größer. <<|im_end|>\n"]
    assert learnt_texts(tokenizer, encoded) == want
    assert (
        learnt_texts(tokenizer, encode_conversation(tokenizer, TALK, turns="last"))
        == want[1:]
    )
    tokenizer.extra_files["chat_template.jinja"] += (
        b"{% generation %}x{% endgeneration %}"
    )
    with pytest.raises(
        MaxlmError, match=r"does not mark each assistant turn as {% generation %}"
    ):
        encode_conversation(tokenizer, TALK)


def test_without_special_tokens_a_turn_is_learnt_to_its_end(tokenizer):
    plain = train(template=PLAIN)
    want = [" 4\n", " \n  Yes, <|im_end|> größer. <\n"]
    assert learnt_texts(plain, encode_conversation(plain, TALK)) == want


def test_a_template_that_rewrites_turns_serves_the_last_alone():
    tokenizer = train(template=REWRITES)
    with pytest.raises(
        MaxlmError, match=r"message 2, or writes it otherwise .*task\.turns=last"
    ):
        encode_conversation(tokenizer, TALK)
    encoded = encode_conversation(tokenizer, TALK, turns="last")
    want = "<think>\n\n</think>\n\n\n  Yes, <|im_end|> größer. <<|im_end|>"
    assert learnt_texts(tokenizer, encoded) == [want]


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        (
            "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor "
            "%}",
            0,
        ),
        ("{% for m in messages[-2:] %}[{{ m.content }}]{% endfor %}", 2),
        (
            "{% for m in messages if m.role != 'assistant' %}[{{ m.content }}]{% "
            "endfor %}",
            2,
        ),
    ],
)
def test_a_template_that_drops_messages_is_refused(template, dropped):
    with pytest.raises(MaxlmError, match=f"the chat template drops message {dropped}"):
        encode_conversation(train(template=template), TALK)


def test_a_prompt_and_its_completion_are_one_text_that_ends(tokenizer):
    encoded = encode_answer(tokenizer, "2 + 2 is", " 4 <|im_end|>")
    assert learnt_texts(tokenizer, encoded) == [" 4 <|im_end|><|im_end|>"]
    assert encoded.tokens[-1] == tokenizer.eos_id
    assert encoded.tokens[0] == tokenizer.bos_id
    assert encoded.tokens.count(tokenizer.eos_id) == 1
    # Where a token would cross from one into the other, the prompt is what a user would
    # send.
    crossing = encode_answer(tokenizer, "It is brie", "f")
    assert crossing.tokens[: crossing.is_target.index(True)][1:] == tokenizer.encode(
        "It is brie"
    )


def test_answers_may_be_text_or_messages(tokenizer):
    question, answer = TALK[:2], TALK[2:3]
    want = encode_conversation(tokenizer, TALK[:3])
    assert encode_answer(tokenizer, question, answer) == want
    assert encode_answer(tokenizer, question, "4") == want
    row = {"chosen": TALK[:3], "rejected": [*question, {**TALK[2], "content": "5"}]}
    chosen, rejected = encode_pair(tokenizer, row)
    assert chosen == want
    assert learnt_texts(tokenizer, rejected) == ["5<|im_end|>"]
    pair = {"prompt": question, "chosen": answer, "rejected": row["rejected"][2:]}
    assert encode_pair(tokenizer, pair) == (chosen, rejected)
    said_twice = row | {
        "prompt": "What is 2 + 2? <|im_end|>"
    }  # as UltraFeedback has it
    assert encode_pair(tokenizer, said_twice) == (chosen, rejected)


USER, ANSWER = TALK[1:3]
CONVERSATIONS = [
    ([USER], "no assistant turn to learn: the roles are user"),
    ([], "no list of messages"),
    ([{"from": "human", "value": "x"}], "no list of messages"),
    ([USER, USER, ANSWER], "message 1 is 'user' after 'user'"),
    ([ANSWER, USER], "message 0 is 'assistant' after 'nothing'"),
    ([USER, SYSTEM, ANSWER], "message 1 is 'system' after 'user'"),
    ([{"role": "user"}, ANSWER], "message 0, of role 'user', has no content"),
    ([USER, {**ANSWER, "content": " "}], "an empty completion: message 1 has no text"),
]
CALLS = [
    (lambda t: encode_answer(t, "x", " \n"), "an empty completion"),
    (
        lambda t: encode_answer(t, 3, "x"),
        "the prompt is of type int, neither text nor a list",
    ),
    (
        lambda t: encode_answer(t, "x", {"a": 1}),
        "the completion is of type dict, neither",
    ),
    (
        lambda t: encode_pair(t, {"prompt": "a", "chosen": "b", "rejected": "b"}),
        "chosen equals",
    ),
    (lambda t: encode_pair(t, {"chosen": "b", "rejected": "c"}), "no column 'prompt'"),
    (
        lambda t: get_column({"Prompt": "a"}, "prompt"),
        "no column 'prompt': there are 'Prompt'",
    ),
    (lambda t: get_column({"prompt": None}, "prompt"), "prompt is null"),
    (
        lambda t: get_label({"label": "good"}),
        "label is 'good'; write true for a good answer",
    ),
    *(
        (partial(encode_conversation, messages=talk), fault)
        for talk, fault in CONVERSATIONS
    ),
]


@pytest.mark.parametrize(("call", "fault"), CALLS)
def test_a_row_that_cannot_be_learnt_is_refused_in_one_line(tokenizer, call, fault):
    with pytest.raises(MaxlmError, match=fault) as caught:
        call(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_base_models_tokenizer_gets_a_template():
    base = train(chat="chatml")
    base.extra_files.clear()
    base.extra_stop_ids = ()
    with pytest.raises(
        MaxlmError, match=r"carries no chat template; set tokenizer\.chat"
    ):
        encode_conversation(base, TALK)
    add_chat_template(base, TokenizerConfig(chat="chatml"))
    assert encode_conversation(base, TALK) == encode_conversation(train(), TALK)
    assert base.stop_ids == (base.special.ids["<|im_end|>"],)
    message = r"tokenizer\.chat=llama3: the vocabulary has no special token <\|start_header_id\|>"
    with pytest.raises(MaxlmError, match=message):
        add_chat_template(base, TokenizerConfig(chat="llama3"))
