"""The same held-out text token by token: what every exit would write, and what was decoded."""

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure

from inference.evaluation.exit_traces import ExitPredictions
from inference.report_page.drawing import Picture, drawn
from inference.report_page.measurements import short_names
from inference.report_page.origins import DecodedText, DecodedToken, Origin
from inference.report_page.page import Section, source_line
from inference.report_page.source import Source
from inference.report_page.visible import TokenTexts, safe, visible, with_signs

_KEPT = "\n\t"
_HEAT = 40
"""Percent of colour in the surest cell; with more, text on it would be hard to read."""
_CELL = 10
"""Characters of a token in a cell."""
_WHAT = {True: "A held-out text", False: "A continuation by all layers"}
_WORDS: dict[Origin, str] = {
    "drafted": "drafted, accepted",
    "lookup": "looked up, accepted",
    "corrected": "corrected, by all layers",
    "plain": "decoded plainly",
}


def tokens_section(
    prompt: str,
    texts: TokenTexts,
    following: Sequence[int],
    predicted: ExitPredictions,
    decoded: Sequence[DecodedText],
    source: Source,
    *,
    held_out: bool,
) -> Section:
    """Return the grid of a held-out text and the texts decoded after the same prompt.

    Args:
        prompt: The text before.
        texts: Of the tokenizer's tokens.
        following: The tokens that follow in the held-out text.
        predicted: What every exit predicts for these.
        decoded: By each strategy.
        source: Of all of it.
        held_out: Whether they are a held-out text's, and not decoded.
    """
    picture = drawn(
        Picture(
            "tokens",
            "Most probable token of every exit at each position of a held-out text",
            lambda figure: _draw(figure, texts, following, predicted),
            (9.4, 1.2 + 0.24 * len(predicted.choices)),
        )
    )
    body = (
        f"<p>{_WHAT[held_out]}, and what every exit finds most probable at each position. The "
        "deeper the blue, the surer the exit; bold, below the line: from this exit on all choose "
        "what the last layer does; underlined: the text's own token. Point at a cell, or go "
        "through the top row with Tab and the arrow keys.</p>"
        f"{_key(predicted)}{_grid(texts, following, predicted)}{source_line(source)}"
        "<h3>The same beginning, decoded</h3>"
        "<p>Greedy, each token in the colour of where it came from. All of these strategies are "
        "lossless: they differ in how tokens were found, not in which.</p>"
        f'{_colors()}<div class="text prompt">{escape(visible(prompt[-400:], keep=_KEPT))}</div>'
        f"{''.join(_decoded(texts, decoded))}{source_line(source)}"
    )
    return Section("tokens", "Token by token", body, (picture,))


def _decoded(texts: TokenTexts, decoded: Sequence[DecodedText]) -> Iterator[str]:
    """Yield what each strategy decoded."""
    names = short_names([text.strategy for text in decoded])
    for text in decoded:
        line = f"{len(text.tokens)} tokens in {text.rounds} rounds"
        if text.drafted:
            line += f", {text.accepted} of {text.drafted} drafted tokens accepted"
        yield f"<h3><code>{safe(names[text.strategy])}</code></h3><p>{line}</p>"
        yield f'<div class="text" data-group>{_text(text.tokens, texts)}</div>'


def _key(predicted: ExitPredictions) -> str:
    least, most = float(predicted.entropy.min()), float(predicted.entropy.max())
    return (
        f'<ul class="key"><li>entropy {most:.1f} nats <span class="ramp"></span> {least:.1f} nats'
        '</li><li><b style="box-shadow:0 -2px 0 var(--vermillion)">token</b> settled</li>'
        "<li><u>token</u> the text's own</li></ul>"
    )


def _colors() -> str:
    items = "".join(
        f'<li><span class="tok {origin}">token</span> {words}</li>'
        for origin, words in _WORDS.items()
    )
    return f'<ul class="key">{items}</ul>'


def _cell_text(text: str) -> str:
    shown = with_signs(text)
    return escape(shown if len(shown) <= _CELL else shown[: _CELL - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _grid(texts: TokenTexts, following: Sequence[int], predicted: ExitPredictions) -> str:
    L, settled = len(predicted.choices), predicted.settled()
    head = "".join(
        f'<th scope="col" tabindex="{-1 if i else 0}" '
        f'title="{_column_tip(texts, predicted, i, token, settled[i])}">'
        f"{_cell_text(texts[token])}</th>"
        for i, token in enumerate(following)
    )
    rows = []
    for E in range(1, L + 1):
        cells = "".join(
            _cell(texts, predicted, E, i, actual=token, settled=settled[i])
            for i, token in enumerate(following)
        )
        rows.append(f'<tr><th scope="row">E={E}</th>{cells}</tr>')
    depths = "".join(f"<td>E={E}</td>" for E in settled)
    last = f'<tr><th scope="row">settled</th>{depths}</tr>'
    return (
        '<div class="scroll" data-group role="region" aria-label="exits by tokens">'
        f'<table class="grid"><thead><tr><th scope="row">text</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{last}</tfoot></table></div>"
    )


def _cell(
    texts: TokenTexts, p: ExitPredictions, E: int, i: int, *, actual: int, settled: int
) -> str:
    choice, most = int(p.choices[E - 1, i]), float(p.entropy.max())
    entropy, sure = float(p.entropy[E - 1, i]), float(p.confidence[E - 1, i])
    kinds = ["settled"] * (settled <= E) + ["first"] * (settled == E)
    kinds += ["right"] if choice == actual else []
    tip = f"E={E}: {with_signs(texts[choice])}\nprobability {sure:.1%}, entropy {entropy:.2f} nats"
    tip += "\nsettled" if settled <= E else ""
    heat = round(_HEAT * (1 - entropy / most) ** 1.5) if most > 0 else _HEAT
    return (
        f'<td class="{" ".join(kinds)}" style="--h:{heat}" title="{escape(tip)}">'
        f"{_cell_text(texts[choice])}</td>"
    )


def _column_tip(texts: TokenTexts, p: ExitPredictions, i: int, token: int, settled: int) -> str:
    """Return what every exit predicts at a position, for those who come by keyboard."""
    lines = [f"text: {with_signs(texts[token])}, settled from E={settled}"]
    lines += [
        f"E={E}: {with_signs(texts[int(p.choices[E - 1, i])])} "
        f"{float(p.confidence[E - 1, i]):.0%}, {float(p.entropy[E - 1, i]):.1f} nats"
        for E in range(1, len(p.choices) + 1)
    ]
    return escape("\n".join(lines))


def _text(tokens: Sequence[DecodedToken], texts: TokenTexts) -> str:
    found = []
    for i, token in enumerate(tokens):
        kinds = f"tok {token.origin}"
        shown = escape(visible(token.text, keep=_KEPT))
        if not token.text:  # within a character of several tokens, or a control token
            shown, kinds = escape(with_signs(texts[token.token])), kinds + " half"
        found.append(
            f'<span class="{kinds}" tabindex="{-1 if i else 0}" '
            f'title="{escape(_tip(token, texts))}">{shown}</span>'
        )
    return "".join(found)


def _tip(token: DecodedToken, texts: TokenTexts) -> str:
    by = {
        "drafted": f"drafted by E={token.layers}, accepted",
        "lookup": "looked up in the text before, accepted",
        "corrected": "corrected, by all layers",
        "plain": "decoded by all layers, no draft",
    }[token.origin]
    return (
        f"{with_signs(texts[token.token])}\n{by}\n"
        f"depth {token.layers} layers, round {token.round}\n"
        f"probability {token.probability:.1%} under all layers\n"
        f"exits settled from E={token.settled}"
    )


def _draw(figure: Figure, texts: TokenTexts, following: Sequence[int], p: ExitPredictions) -> None:
    axes, count = figure.subplots(), min(16, len(following))
    entropy = p.entropy[:, :count].numpy()
    image = axes.imshow(entropy, cmap="cividis_r", aspect="auto", interpolation="none")
    settled, L = p.settled(), len(p.choices)
    for i in range(count):
        for row in range(L):
            red, green, blue, _ = image.cmap(image.norm(entropy[row, i]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                i,
                row,
                with_signs(texts[int(p.choices[row, i])])[:8],
                ha="center",
                va="center",
                fontsize=7,
                color="#ffffff" if dark else "#000000",
                fontweight="bold" if row + 1 >= settled[i] else "normal",
            )
    axes.step(
        np.arange(-0.5, count),
        [settled[0] - 1.5, *(s - 1.5 for s in settled[:count])],
        color="#d55e00",
        linewidth=1.6,
    )
    labels = [with_signs(texts[token])[:8] for token in following[:count]]
    axes.set_xticks(range(count), labels, fontsize=7.5)
    axes.xaxis.tick_top()
    axes.set_title("Most probable token of every exit, below the text's own; bold: settled")
    ticks = range(0, L, max(1, L // 16))
    axes.set_yticks(ticks, [f"E={row + 1}" for row in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label("entropy (nats)")
    bar.outline.set_visible(False)
