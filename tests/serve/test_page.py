"""The page at / in a browser: it chats, shows tokens a second, and asks for a key where one is needed."""

import re
import shutil

import pytest

from tests.serve.conftest import serving

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_is_one_file_that_nothing_else_may_enter(served):
    connection = served.client._client.get(f"http://127.0.0.1:{served.port}/")
    assert connection.status_code == 200
    policy = connection.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.findall(r"(?:src|href)=|https?://|@import|url\(|innerHTML", connection.text)


@pytest.fixture(scope="module")
def chromium():
    if BROWSER is None:
        pytest.skip("no Chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.browser
def test_it_chats_in_a_browser(chromium, engine_of_tests):
    with serving(engine_of_tests, keys=frozenset({"secret"})) as served:
        page = chromium.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.wait_for_selector("#key:visible")
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        page.locator("#name", has_text="tiny, 128 tokens").wait_for()
        page.fill("#temperature", "0")
        page.fill("#text", "<b>hello</b>")
        page.press("#text", "Enter")
        page.locator("#send", has_text="Send").wait_for()
        expected = served.model.chat([{"role": "user", "content": "<b>hello</b>"}], max_new_tokens=200).text
        assert page.locator(".user").text_content() == "<b>hello</b>"
        assert page.locator(".assistant").text_content() == expected
        assert re.search(
            r"tokens, [\d.]+ tokens/s, first after [\d.]+ s, \d+ read", page.locator(".facts").text_content()
        )
        assert not faults
        page.close()
