"""The page, in a browser: a prompt is continued, and each token is in the colour of its source."""

import re

from tests.browser import opened


def type_prompt(page, text, **fields):
    page.fill("#prompt", text)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#go")


def settled(page):
    page.wait_for_selector("#stop[disabled]")


COLOUR = "(one) => getComputedStyle(one).backgroundColor"


def test_tokens_come_in_the_colours_of_the_legend(chromium, server, plain):
    with opened(chromium, server.url, color_scheme="light") as (page, errors):
        page.wait_for_selector("#model:not(:empty)")
        assert page.inner_text("#model").startswith("run, step 7, 4 layers")
        assert not page.is_visible("#key")
        type_prompt(page, "the cat sat", max_tokens="40")
        settled(page)
        assert page.text_content("#text") == "the cat sat" + plain("the cat sat", 40)
        spans = page.eval_on_selector_all("#text span", "all => all.map((one) => one.className)")
        assert spans[0] == "prompt"
        assert {"accepted", "corrected"} <= {*spans}
        colours = [
            page.eval_on_selector(f"{where} .{kind}", COLOUR)
            for kind in ("accepted", "corrected")
            for where in (".legend", "#text")
        ]
        assert colours[0] == colours[1] != colours[2] == colours[3]
        assert page.inner_text("#tokens") == "40"
        assert re.fullmatch(r"\d+\.\d\s%", page.inner_text("#acceptance"))
        assert page.inner_text("#decoded_by") == "self_speculative:E=2"
        ink = "(one) => getComputedStyle(one).color"
        assert page.eval_on_selector("#text .prompt", ink) != page.eval_on_selector(
            "#text .accepted", ink
        )
        assert len({*colours, page.eval_on_selector("body", COLOUR)}) == 3
        page.emulate_media(color_scheme="dark")
        dark = page.eval_on_selector("#text .accepted", COLOUR)
        assert dark not in colours
        assert page.eval_on_selector("body", COLOUR) == "rgb(18, 22, 28)"
        # Plain decoding has neither colour, and a refusal is shown.
        type_prompt(page, "a <b>mat</b>", max_tokens="5", strategy="autoregressive")
        settled(page)
        assert page.text_content("#text").startswith("a <b>mat</b>")
        assert page.locator("#text .plain").count() == 5
        assert page.locator("#text .accepted").count() == 0
        assert page.inner_text("#acceptance") == "no drafts"
        assert errors == []
        type_prompt(page, "a", max_tokens="5", strategy="nothing")
        settled(page)
        assert page.inner_text("#error").startswith("strategy: nothing")
        type_prompt(page, "a", max_tokens="5", strategy="", temperature="0.25")
        settled(page)
        assert page.inner_text("#error") == ""
        assert page.inner_text("#tokens") == "5"
