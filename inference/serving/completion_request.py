"""The body of a request for completions, checked: each field is used, or refused in one line.

Knows nothing of the model: what its context and vocabulary allow is checked where it is at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.foreign_json import parse_object, shown, typed
from data.suggestion import suggest
from inference.engine.sampling import Sampling
from inference.serving.request_error import RequestError, wrong

HIGHEST_TEMPERATURE = 2.0
MOST_STOPS = 16
LONGEST_STOP = 256
LAST_SEED = 2**64 - 1
_UNUSED: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
    "suffix": ("",),
}
"""Fields of the API that nothing here does, with the values besides null that ask for nothing."""
_USED: Mapping[str, Any] = {
    "echo": bool | None,
    "max_tokens": int | None,
    "model": str | None,
    "n": int | None,
    "prompt": object,
    "seed": int | None,
    "stop": object,
    "strategy": str | None,
    "stream": bool | None,
    "stream_options": object,
    "temperature": float | None,
    "top_k": int | None,
    "top_p": float | None,
    "user": str | None,
}
"""Fields and their types; `strategy` and `top_k` are not OpenAI's, and `user` is kept nowhere."""


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What a client asks for."""

    model: str | None
    prompts: list[str] | list[list[int]]
    """Texts, or token ids; at least one."""
    max_tokens: int
    """Most new tokens of each text, at least 1."""
    sampling: Sampling
    seed: int | None
    n: int
    """Continuations of each prompt."""
    stop: tuple[str, ...]
    echo: bool
    stream: bool
    include_usage: bool
    strategy: str | None


def read_request(body: bytes) -> CompletionRequest:
    """Return what the body of a request asks for.

    Raises:
        RequestError: It is not JSON, or a field is unknown, of the wrong type or out of its range.
    """
    try:
        content = parse_object(body)
    except ValueError as error:  # not UTF-8 and not JSON, too
        raise RequestError(400, f"body: no JSON object ({_reason(error)}), send one") from None
    _refuse_unused(content)
    value = {name: _take(content, name, hint) for name, hint in _USED.items()}
    stream = bool(value["stream"])
    if value["stream_options"] is not None and not stream:
        raise wrong("stream_options", value["stream_options"], "give it with stream alone")
    return CompletionRequest(
        model=value["model"],
        prompts=_prompts(value["prompt"]),
        max_tokens=_within("max_tokens", value["max_tokens"], 16, 1, 2**31),
        sampling=_sampling(value),
        seed=value["seed"] and _within("seed", value["seed"], 0, 0, LAST_SEED),
        n=_within("n", value["n"], 1, 1, 2**31),
        stop=_stops(value["stop"]),
        echo=bool(value["echo"]),
        stream=stream,
        include_usage=_include_usage(value["stream_options"]),
        strategy=value["strategy"],
    )


def _reason(error: ValueError) -> str:
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _refuse_unused(content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if name in _UNUSED:
            if value is not None and not any(_same(value, other) for other in _UNUSED[name]):
                raise wrong(name, value, "this server has no such thing, leave it out")
        elif name not in _USED:
            hint = suggest(name[:40], [*_USED])
            raise RequestError(400, f"field: {shown(name)} does not exist, {hint}")


def _same(value: object, other: object) -> bool:
    return type(value) is not bool and value == other


def _take(content: Mapping[str, Any], name: str, hint: Any) -> Any:
    try:
        return typed(content.get(name), hint, name)
    except ValueError as error:
        raise RequestError(400, str(error)) from None


def _within(name: str, value: int | None, default: int, least: int, most: int) -> int:
    if value is None:
        return default
    if not least <= value <= most:
        raise wrong(name, value, f"give {least} to {most}")
    return value


def _sampling(value: Mapping[str, Any]) -> Sampling:
    temperature = 1.0 if value["temperature"] is None else float(value["temperature"])
    if not 0.0 <= temperature <= HIGHEST_TEMPERATURE:
        raise wrong("temperature", temperature, f"give 0 (greedy) to {HIGHEST_TEMPERATURE:g}")
    top_k = value["top_k"]
    if top_k is not None and top_k >= 2**62:
        raise wrong("top_k", top_k, "give fewer tokens")
    try:
        return Sampling(temperature=temperature, top_k=top_k, top_p=value["top_p"])
    except ValueError as error:
        raise RequestError(400, str(error)) from None


def _prompts(prompt: object) -> list[str] | list[list[int]]:
    """Return a text, a list of texts, token ids or a list of those as a list."""
    if isinstance(prompt, str):
        return [_text("prompt", prompt)]
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(one, str) for one in prompt):
            return [_text("prompt", one) for one in prompt]
        if all(isinstance(one, list) and _are_ids(one) for one in prompt):
            if not all(prompt):
                raise wrong("prompt", prompt, "give each at least one token")
            return prompt
    raise wrong("prompt", prompt, "give a text, token ids, or a list of texts or of token ids")


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _text(name: str, text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise wrong(name, text, "half a surrogate pair is no text, give text")
    return text


def _stops(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong("stop", value, "give a text or a list of texts")
    if len(texts) > MOST_STOPS:
        raise RequestError(400, f"stop: {len(texts)} texts, give at most {MOST_STOPS}")
    for text in texts:
        if not 1 <= len(_text("stop", text)) <= LONGEST_STOP:
            raise wrong("stop", text, f"give texts of 1 to {LONGEST_STOP} characters")
    return tuple(texts)


def _include_usage(options: object) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise wrong("stream_options", options, "it has include_usage alone")
    return bool(_take(options, "include_usage", bool | None))
