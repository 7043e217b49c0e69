"""Telling a model's thoughts apart from its answer."""

from dataclasses import dataclass
from typing import NamedTuple

from maxlm.inference.outputs import count_begun


class ReasoningFormat(NamedTuple):
    """Marks around a model's thoughts."""

    opener: str
    closer: str


_FORMATS = (
    ReasoningFormat("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, SmolLM3, MiniMax
    ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral
    ReasoningFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
)


def detect_reasoning_format(template: str) -> ReasoningFormat | None:
    """Returns the marks that a chat template knows; None: its models do not think
    aloud."""
    for marks in _FORMATS:
        if marks.opener in template or marks.closer in template:
            return marks
    return None


class ReasonedText(NamedTuple):
    """Thoughts and content, as far as a piece of an answer's text makes them
    certain."""

    reasoning: str
    content: str


@dataclass(eq=False)
class ReasoningParser:
    """Reads an answer's text, as it comes, as thoughts and then content.

    Attributes:
        marks: None: all is content.
        is_inside: whether the next text is a thought: at first, whether the prompt
            opened it.
    """

    marks: ReasoningFormat | None
    is_inside: bool = False

    def __post_init__(self) -> None:
        self._is_before = self.marks is not None and not self.is_inside
        self._text = ""
        # Line breaks between the marks and what they enclose or precede belong to
        # neither.
        self._drops_breaks = self.is_inside

    def push(self, text: str, *, final: bool = False) -> ReasonedText:
        """Takes more text; returns what is certain with it. ``final``: no more will
        come."""
        self._text += text
        if self._is_before:
            self._look_for_opener(final)
        reasoning = self._take_reasoning(final) if self.is_inside else ""
        content = ""
        if not self.is_inside and not self._is_before:
            content = self._take_content()
        return ReasonedText(reasoning, content)

    def _look_for_opener(self, final: bool) -> None:
        """Thoughts begin an answer or are none of it."""
        assert self.marks is not None
        start = self._text.lstrip()
        if start.startswith(self.marks.opener):
            self._text = start.removeprefix(self.marks.opener)
            self._is_before = False
            self.is_inside = True
            self._drops_breaks = True
        elif final or not self.marks.opener.startswith(start):
            self._is_before = False

    def _take_reasoning(self, final: bool) -> str:
        assert self.marks is not None
        self._drop_breaks()
        thought, closer, rest = self._text.partition(self.marks.closer)
        if closer:
            self._text = rest
            self.is_inside = False
            self._drops_breaks = True
            return thought.rstrip("\n")
        # The end may begin the closing mark, or be the line breaks before it.
        num_begun = 0 if final else count_begun(thought, self.marks.closer)
        sure = thought[: len(thought) - num_begun].rstrip("\n")
        self._text = "" if final else thought[len(sure) :]
        return sure

    def _take_content(self) -> str:
        self._drop_breaks()
        content = self._text
        self._text = ""
        return content

    def _drop_breaks(self) -> None:
        if self._drops_breaks:
            self._text = self._text.lstrip("\n")
            self._drops_breaks = not self._text  # they may come in pieces
