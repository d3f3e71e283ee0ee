"""Answers to requests for completions, as JSON: whole, or in chunks as text comes."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence

from inference.serving.job import Job, Progress
from inference.serving.request_error import RequestError


class Answer:
    """The JSON of one request's answer.

    Args:
        job: The request.
        model: Its name.
        echoed: What each continuation begins with, its prompt or "".
        prompt_tokens: Of all prompts.
        include_usage: Whether chunks end with the counts of tokens.
    """

    def __init__(
        self,
        job: Job,
        *,
        model: str,
        echoed: Sequence[str],
        prompt_tokens: int,
        include_usage: bool,
    ) -> None:
        self._job, self._echoed, self._prompt_tokens = job, echoed, prompt_tokens
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens so far."""
        new = sum(text.reply.tokens for text in self._job.texts)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    def whole(self, progress: Sequence[Progress]) -> dict[str, object]:
        """Return the answer in one piece."""
        texts = [*self._echoed]
        choices: list[dict[str, object]] = [{} for _ in texts]
        for part in progress:
            texts[part.index] += "".join(span.text for span in part.spans)
            if part.ending:
                choices[part.index] = self._choice(part.index, "", part.ending) | self._extra(part)
        for choice, text in zip(choices, texts, strict=True):
            choice["text"] = text
        return {**self._head, "choices": choices, "usage": self.usage()}

    def chunk(self, part: Progress) -> str:
        """Return what a round added to one continuation, as an event."""
        text = "".join(span.text for span in part.spans)
        if part.index not in self._begun:
            self._begun.add(part.index)
            text = self._echoed[part.index] + text
        choice = self._choice(part.index, text, part.ending)
        if part.ending:
            choice |= self._extra(part)
        tokens = [{"text": span.text, "source": span.source} for span in part.spans]
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._head, "choices": [choice], **usage, "skipstone": {"tokens": tokens}})

    def end(self) -> str:
        """Return the events after the last chunk."""
        counts = {**self._head, "choices": [], "usage": self.usage()}
        return (event(counts) if self._include_usage else "") + "data: [DONE]\n\n"

    def _choice(self, index: int, text: str, ending: str | None) -> dict[str, object]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": ending}

    def _extra(self, part: Progress) -> dict[str, object]:
        """Return what is not OpenAI's: how a continuation was decoded."""
        text = self._job.texts[part.index]
        counts = {
            "strategy": part.strategy,
            "seed": text.draw.seed if text.draw.sampling.temperature else None,
            "tokens": text.reply.tokens,
            "drafted": text.reply.drafted,
            "accepted": text.reply.accepted,
        }
        return {"skipstone": counts}


def event(content: Mapping[str, object]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def failed(refusal: RequestError) -> str:
    """Return the event of an error after text was sent."""
    return event(refusal.content())
