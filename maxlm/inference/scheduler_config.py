"""How much the engine holds at once, and whether a request can ever run in it."""

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.inference.pages import count_spanned_pages
from maxlm.inference.requests import GenerationRequest


class SchedulerConfig(Config):
    """How much the engine holds at once, and does in one step; numbers are for each data shard."""

    max_sequences: int = Field(default=16, gt=0)
    """Sequences that run together; others wait."""
    max_length: int = Field(default=2048, gt=1)
    """Tokens of the longest sequence, prompt and output."""
    page_size: int = Field(default=16, gt=0)
    """Tokens a page of the cache: small ones waste less at a sequence's end and share more, large
    ones are read faster."""
    num_pages: int | None = Field(default=None, gt=1)
    """Pages of the cache in each layer that sees everything, one of them for padding; layers with a
    window need fewer. null: enough for ``max_sequences`` of ``max_length``."""
    prefill_tokens: int = Field(default=512, gt=0)
    """Tokens of prompts in one step: more start sooner, and hold up those that decode."""
    max_chunks: int = Field(default=8, gt=0)
    """Prompts that have a part in them."""
    decode_steps: int = Field(default=8, gt=0)
    """Tokens that each sequence generates in one dispatch while no prompt is computed and nothing
    needs the host between: more cost less each, and arrive in larger groups."""
    prefix_cache: bool = True
    """true: computed pages stay while there is room, and prompts that begin alike share them;
    false: each request computes its own."""

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_length // self.page_size)


def count_pages(config: SchedulerConfig, windows: tuple[int | None, ...]) -> tuple[int, ...]:
    """Return the pages of each group's pool in one shard, page 0 included.

    Args:
        windows: tokens that a token sees in each group of layers, itself included; None: all.
    """
    full = config.num_pages or config.max_sequences * config.pages_per_sequence + 1
    chunk, size = config.prefill_tokens, config.page_size
    spans = [window and count_spanned_pages(window - 1 + chunk, size) for window in windows]
    return tuple(min(full, config.max_sequences * span + 1) if span else full for span in spans)


def check_request(
    request: GenerationRequest,
    num_prompt_tokens: int,
    config: SchedulerConfig,
    windows: tuple[int | None, ...],
    num_virtual_tokens: int = 0,
) -> None:
    """Refuse a request, with so many tokens of the decoder, virtual ones among them, that could not
    even run alone."""
    where, new = f"request {request.request_id}", request.sampling.max_new_tokens
    if not request.prompt_tokens or request.num_sequences < 1:
        what = "a request needs a token to continue, and a sequence"
        raise MaxlmError(what, where=where, fix="give a prompt, and num_sequences of 1 or more")
    if tails := request.continuations:
        if not all(tails) or request.num_sequences != len(tails) or request.prompt_logprobs is None:
            what = "continuations have tokens, a sequence each, and prompt_logprobs"
            raise MaxlmError(what, where=where, fix=f"set num_sequences={len(tails)}")
        num_prompt_tokens, new = num_prompt_tokens + max(map(len, tails)) - 1, 0
    if max(len(request.prompt_tokens), num_prompt_tokens + new) > config.max_length:
        what = f"{len(request.prompt_tokens):,} tokens of prompt and max_new_tokens={new} are more "
        longest = config.max_length - num_virtual_tokens
        what += f"than the {longest:,} of the longest sequence (max_length)"
        raise MaxlmError(what, where=where, fix="shorten the prompt, or ask for fewer new tokens")
    for window, num_pages in zip(windows, count_pages(config, windows), strict=True):
        # The last token is never read.
        wanted = -(-(num_prompt_tokens + max(new, 1) - 1) // config.page_size)
        if window is not None:
            wanted = min(wanted, count_spanned_pages(window, config.page_size))
        if wanted > num_pages - 1:
            what = f"it needs {wanted:,} pages of {config.page_size} tokens, and the cache has "
            what += f"{num_pages - 1:,} (num_pages)"
            raise MaxlmError(what, where=where, fix="raise num_pages, or ask for fewer tokens")
