"""Promise: what stands between two turns is what the chat template writes there, behind
the tokens that the policy drew, or one line says why it cannot be."""

import pytest

from maxlm.data.tokenizer.chat import encode_chat, render_chat
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import import_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.rl.environments import Reply, SingleTurnEnvironment
from maxlm.rl.rollouts.replies import check_template_keeps_turns, encode_reply
from maxlm.rl.samples import Prompt, Sample
from tests.data.tokenizer.foreign import write_checkpoint
from tests.errors import message

CHAT = SingleTurnEnvironment(chat=True, reply_role="user")
# As Qwen3's and DeepSeek-R1's: turns before the last question lose their thinking.
DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What stands between a turn's text and its end.
PUTS_BEFORE_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ LAST if loop.last else '!' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_TURNS = "{{ messages[0].content }}{{ messages[-1].content }}"


def with_template(folder, template: str, name: str = "smollm2") -> Tokenizer:
    write_checkpoint(folder, name)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = import_tokenizer(folder)
    turn_end = tokenizer.special.ids["<|im_end|>"]
    tokenizer.extra_stop_ids = (*tokenizer.extra_stop_ids, turn_end)
    return tokenizer


def make_sample(tokenizer: Tokenizer, *turns: tuple[str, str], end: str) -> Sample:
    """A sample whose last turn, the policy's, has a token for each byte of its text,
    and ends with a special token if one is named."""
    row = {"prompt": "Add 2 and 3."}
    prompt = CHAT.encode_prompt(tokenizer, row)
    drawn = [t for char in turns[-1][1] for t in tokenizer.encode(char)]
    if end:
        drawn.append(tokenizer.special.ids[end])
    tokens = [*prompt, *drawn]
    return Sample(
        Prompt(0, tuple(prompt), row),
        0,
        tokens=tokens,
        is_sampled=[i >= len(prompt) for i in range(len(tokens))],
        log_probs=[0.0] * len(tokens),
        versions=[0] * len(tokens),
        is_complete=True,
        turns=list(turns),
    )


def continue_chat(tokenizer: Tokenizer, turn: str, reply: str, end: str) -> str:
    """The text of a conversation whose policy answered once and goes on."""
    sample = make_sample(tokenizer, ("assistant", turn), end=end)
    tokens = encode_reply(CHAT, tokenizer, sample, Reply(reply, "user"))
    return tokenizer.decode([*sample.tokens, *tokens])


@pytest.mark.parametrize("form", ["chatml", "llama3"])
def test_the_text_is_the_templates(form):
    special = {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    }[form]
    config = TokenizerConfig(
        vocab_size=256 + 1 + len(special), chat=form, extra_special_tokens=special
    )
    tokenizer = train_tokenizer(config, ["a"])
    turn_end = special[-1]
    messages = [
        {"role": "user", "content": "Add 2 and 3."},
        {"role": "assistant", "content": "é <calc>"},
        {"role": "user", "content": "5 qturn."},
    ]
    expected = render_chat(tokenizer, messages, add_generation_prompt=True)
    # Drawn with its end, or cut by a stop string.
    for end in (turn_end, ""):
        text = continue_chat(tokenizer, "é <calc>", "5 qturn.", end)
        assert text == expected
    # A turn that ends with another token that ends turns keeps it.
    text = continue_chat(tokenizer, "é <calc>", "5 qturn.", "<|endoftext|>")
    assert text == expected.replace(f"é <calc>{turn_end}", "é <calc><|endoftext|>")
    # A literal in a reply ends no turn.
    sample = make_sample(tokenizer, ("assistant", "x"), end=turn_end)
    reply = Reply(f"a{turn_end}b", "user")
    tokens = encode_reply(CHAT, tokenizer, sample, reply)
    assert reply.text in tokenizer.decode(tokens)
    assert tokens.count(tokenizer.special.ids[turn_end]) == 1
    check_template_keeps_turns(CHAT, tokenizer)


def test_later_turns_follow_all_earlier_ones(chat_tokenizer):
    turns = [("assistant", "a"), ("user", "b"), ("assistant", ""), ("user", "c")]
    sample = make_sample(chat_tokenizer, *turns, ("assistant", "d"), end="<|im_end|>")
    tokens = encode_reply(CHAT, chat_tokenizer, sample, Reply("e", "user"))
    written = "\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == chat_tokenizer.encode(written, allow_special=True)


def test_text_is_continued_as_it_is(chat_tokenizer):
    plain = SingleTurnEnvironment()
    sample = make_sample(chat_tokenizer, ("assistant", "x"), end="")
    tokens = encode_reply(plain, chat_tokenizer, sample, Reply(" the <|im_end|>"))
    assert tokens == chat_tokenizer.encode(" the <|im_end|>")
    assert chat_tokenizer.special.ids["<|im_end|>"] not in tokens
    # A tokenizer that puts a space before every text.
    config = TokenizerConfig(kind="sentencepiece_bpe", vocab_size=290)
    spaced = train_tokenizer(config, ["the sun rises over a quiet sea\n" * 9])
    tokens = encode_reply(plain, spaced, sample, Reply("sea"))
    before = spaced.encode("a quiet ")
    assert spaced.decode([*before, *tokens]) == "a quiet sea"


def test_templates_that_rewrite_turns(tmp_path):
    tokenizer = with_template(tmp_path, DROPS_THINKING)
    error = message(check_template_keeps_turns, CHAT, tokenizer)
    assert "writes an earlier turn '<think>" in error
    assert "environment.rewritten_turns=keep_drawn" in error
    keeps = CHAT.model_copy(update={"rewritten_turns": "keep_drawn"})
    check_template_keeps_turns(keeps, tokenizer)
    # What was drawn stands, and what follows it is the template's.
    text = continue_chat(tokenizer, "<think>2+3</think>5", "and 4?", "<|im_end|>")
    question = [{"role": "user", "content": "Add 2 and 3."}]
    before = tokenizer.decode(
        encode_chat(tokenizer, question, add_generation_prompt=True)
    )
    assert text == (
        f"{before}<think>2+3</think>5<|im_end|>\n<|im_start|>user\nand 4?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_templates_that_cannot_be_gone_on_with(tmp_path):
    tokenizer = with_template(tmp_path, DROPS_TURNS)
    error = message(continue_chat, tokenizer, "x", "y", "<|im_end|>")
    assert "the chat template drops a turn" in error
    template = PUTS_BEFORE_END.replace("LAST", "'?'")
    tokenizer = with_template(tmp_path, template)
    error = message(continue_chat, tokenizer, "x", "y", "<|im_end|>")
    assert "the chat template ends a turn otherwise once others follow" in error
    # A stop string does not end it.
    assert "x!<|im_end|>\n<|im_start|>user\ny" in continue_chat(tokenizer, "x", "y", "")
    tokenizer = with_template(tmp_path, PUTS_BEFORE_END.replace("LAST", "'!'"))
    text = continue_chat(tokenizer, "x", "y", "<|im_end|>")
    assert "x<|im_end|>\n<|im_start|>user\ny!<|im_end|>" in text
