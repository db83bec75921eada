"""The page at `/` in a real browser without a head. Skipped only where no browser is installed."""

import re
import shutil
from collections.abc import Iterator
from functools import partial

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from jaxserve.serving.fake_runner import FakeRule
from jaxserve.serving.fake_service import VOCAB_SIZE, byte_tokenizer, fake_service
from jaxserve.serving.http.background import BackgroundServer, serve_in_background
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.server_options import ServerOptions

KEY = "sesame-0123456789abcdef"
GREEDY = SamplingParams(temperature=0.0).resolved({})
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            if found is None and "Executable doesn't exist" in error.message:
                pytest.skip("no Chromium is installed; run `playwright install chromium`")
            raise
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    options = ServerOptions(model_name="fake")
    with serve_in_background(partial(fake_service, 0.01), options) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: BackgroundServer) -> Iterator[Page]:
    """Yields the page, which must neither complain nor fetch anything from elsewhere."""
    with browser.new_context() as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        yield page
        assert complaints == []
        assert all(url.startswith((server.url, "data:")) for url in asked)


def wanted(prompt: bytes, count: int) -> str:
    ids = FakeRule(VOCAB_SIZE).continue_prompt(prompt, GREEDY, count)
    return byte_tokenizer().decode(ids)


def say(page: Page, text: str, tokens: int) -> None:
    page.get_by_label("temperature").fill("0")
    page.get_by_label("tokens", exact=True).fill(str(tokens))
    page.get_by_label("message").fill(text)
    page.get_by_label("message").press("Enter")


def shown(page: Page, at: int) -> str:
    return str(page.locator(".turn .text").nth(at).evaluate("box => box.textContent"))


def test_the_page_tells_of_model_and_load(page: Page) -> None:
    expect(page).to_have_title("fake · jaxserve")
    expect(page.locator("#model")).to_have_text("fake")
    expect(page.locator("#facts")).to_have_text("fake · float32 · context 512")
    expect(page.locator("#word")).to_have_text("ready")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#pages")).to_have_text("0.0%")


def test_an_answer_streams_into_the_page(page: Page, server: BackgroundServer) -> None:
    say(page, "hi", 300)
    expect(page.locator(".turn.open .text")).to_have_text(re.compile(r".{5,}", re.DOTALL))
    assert len(shown(page, 1)) < len(wanted(b"[user]hi\n[assistant]", 300)), "it still grows"
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#rate")).to_have_text(re.compile(r"^[1-9]\d*"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn .told").nth(1)).to_have_text(re.compile("^stopped · first token"))
    expect(page.locator("#running")).to_have_text("0")


def test_a_conversation_goes_on(page: Page) -> None:
    say(page, "hi", 4)
    expect(page.locator(".turn .told").nth(1)).to_have_text(re.compile("length .* 4 tokens"))
    first = wanted(b"[user]hi\n[assistant]", 4)
    assert shown(page, 1) == first
    say(page, "and?", 4)
    expect(page.locator(".turn .told").nth(3)).to_have_text(re.compile("length"))
    before = f"[user]hi\n[assistant]{first}\n[user]and?\n[assistant]".encode()
    assert shown(page, 3) == wanted(before, 4)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_a_text_is_continued(page: Page) -> None:
    page.get_by_label("mode").select_option("text")
    say(page, "hello", 6)
    expect(page.locator(".turn .told").nth(1)).to_have_text(re.compile("length"))
    assert shown(page, 1) == wanted(b"hello", 6)


def test_an_answer_without_text_says_so(page: Page) -> None:
    end = '{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}'
    usage = '{"choices": [], "usage": {"completion_tokens": 1}}'
    body = "".join(f"data: {data}\n\n" for data in (end, usage, "[DONE]"))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
    say(page, "hi", 4)
    expect(page.locator(".turn .told").nth(1)).to_have_text(
        re.compile("stop · no text.* · 1 token$")
    )


def test_what_people_write_is_text_and_no_markup(page: Page) -> None:
    say(page, "<img src=x onerror=alert(1)><b>bold</b>", 1)
    expect(page.locator(".turn.user .text")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator(".turn b, .turn img")).to_have_count(0)


def test_a_refusal_is_shown(browser: Browser, server: BackgroundServer) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("fake")
        say(page, "x" * 600, 4)
        expect(page.locator(".turn.failed .text")).to_have_text(re.compile("context of 512 tokens"))
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_the_key_is_asked_for_by_the_browser(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice {KEY}\n")
    options = ServerOptions(model_name="fake", api_key_file=keys)
    with serve_in_background(fake_service, options) as server:
        with (
            browser.new_context() as context,
            pytest.raises(Error, match="INVALID_AUTH_CREDENTIALS"),
        ):
            context.new_page().goto(server.url)
        with browser.new_context(http_credentials={"username": "", "password": KEY}) as context:
            page = context.new_page()
            page.goto(server.url)
            expect(page.locator("#model")).to_have_text("fake")
            say(page, "hi", 3)
            expect(page.locator(".turn .told").nth(1)).to_have_text(re.compile("3 tokens"))


def test_the_reference_is_a_page_too(page: Page, server: BackgroundServer) -> None:
    page.get_by_role("link", name="API reference").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("jaxserve")
    expect(page.get_by_text("/v1/chat/completions")).to_be_visible()
