"""Texts that are being continued: pieces as they come, whole continuations as they end."""

from collections import deque
from collections.abc import Iterator, Sequence

from data.chat_template import ChatTemplate
from data.encoding import encode_chat
from inference.engine.counters import Counters
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.loading.run import Run
from inference.strategies.registry import describe
from inference.text.continuation import Continuation, Piece, Provenance, provenance
from inference.text.detokenizer import Detokenizer


class TextStream:
    """Continues texts up to EOS; iterate over it for one `Piece` for each new token.

    Args:
        run: The checkpoint.
        prompts: The texts.
        strategy: How to decode.
        max_new_tokens: Most tokens to add to each.
        sampling: How tokens are drawn.
        seed: Of every random draw.
        batch_size: Texts decoded at once; the next takes the row of the first that ends.
        chat: Reads each text as a user's turn, and begins the answer; None: reads it as it is.

    Raises:
        ValueError: A prompt is not valid Unicode or too long, or an option does not fit the model.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[str],
        strategy: Strategy,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        batch_size: int,
        chat: ChatTemplate | None = None,
    ) -> None:
        self.prompts, self.strategy = list(prompts), strategy
        self._tokenizer, self._stop_tokens = run.tokenizer, frozenset(run.stop_tokens)
        self._generation = Generation(
            run.model,
            [encode_prompt(run, text, chat) for text in prompts],
            strategy,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop_tokens=run.stop_tokens,
            sampling=sampling,
            seed=seed,
            graphs=run.graphs,
        )
        room = run.model.config.max_seq_len
        encoded = self._generation.prompts
        self._limits = [min(max_new_tokens, room - len(prompt)) for prompt in encoded]
        self._detokenizers = [Detokenizer(run.tokenizer, prompt) for prompt in encoded]
        self._provenance: list[list[Provenance]] = [[] for _ in prompts]
        self._new: deque[tuple[int, int]] = deque()
        """Tokens without a piece yet: index of the continuation, and of the token in it."""

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while not self._new:
            self._decode()
        index, i = self._new.popleft()
        token = self._generation.tokens[index][i]
        text = self._detokenizers[index].push(token)
        if self._ended(index) and i + 1 == len(self._generation.tokens[index]):
            text += self._detokenizers[index].finish()
        return Piece(index, text, token, self._provenance[index][i])

    def continuations(self) -> Iterator[Continuation]:
        """Decode to the end; yield in the order of the prompts, each as soon as it is known."""
        for index in range(len(self.prompts)):
            while not self._ended(index):
                self._decode()
            yield self._continuation(index)
        self._generation.finish()

    @property
    def counters(self) -> Counters:
        """Counts of all that was decoded so far."""
        return self._generation.counters

    def _decode(self) -> None:
        """Run a round.

        Raises:
            StopIteration: All is decoded.
        """
        for emission in next(self._generation):
            index, before = emission.prompt_index, len(self._provenance[emission.prompt_index])
            self._provenance[index] += provenance(emission)
            self._new.extend((index, before + i) for i in range(len(emission.tokens)))

    def _ended(self, index: int) -> bool:
        tokens = self._generation.tokens[index]
        at_stop = not self._stop_tokens.isdisjoint(tokens[-1:])
        return at_stop or len(tokens) == self._limits[index]

    def _continuation(self, index: int) -> Continuation:
        prompt, tokens = self._generation.prompts[index], self._generation.tokens[index]
        before = len(self._tokenizer.decode(prompt))
        return Continuation(
            prompt=self.prompts[index],
            text=self._tokenizer.decode(prompt + tokens)[before:],
            tokens=tokens,
            provenance=self._provenance[index],
            strategy=describe(self.strategy),
            counters=self.counters,
            drafts=self._generation.drafts[index],
        )


def encode_prompt(run: Run, text: str, chat: ChatTemplate | None = None) -> list[int]:
    """Return the ids of a prompt, BOS first.

    Raises:
        ValueError: It is no text, or half a surrogate pair stands in it.
    """
    if not isinstance(text, str):
        raise ValueError(f"prompts: one is of type {type(text).__name__}, give texts")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"prompt: {text[:40]!a} is not valid UTF-8, give text")
    if chat is not None:
        return encode_chat(run.tokenizer, chat, [{"role": "user", "content": text}])
    return [run.tokenizer.bos_id, *run.tokenizer.encode(text)]
