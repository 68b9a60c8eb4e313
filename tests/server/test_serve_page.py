"""The chat page in headless Chromium, by keyboard alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from make.serving import Server, make_model, serving

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=900,720",
)


for needed in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
webdriver = pytest.importorskip("selenium.webdriver")
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
Keys = webdriver.Keys
if not (CHROMIUM and DRIVER):
    pytest.skip(
        "chromium and chromedriver are not installed: as root: python tests/install_chromium.py",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("page") / "tiny-moe", is_native=True)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(model, "--context", "16384") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    browser.get(server.url + "/")
    until(browser, lambda: "tiny-moe" in browser.title)
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def until(browser: Any, holds: Callable[[], Any], seconds: float = 30) -> Any:
    return WebDriverWait(browser, seconds, 0.05).until(lambda _: holds())


def by_id(page: Any, name: str) -> Any:
    return page.find_element(By.ID, name)


def answers(page: Any) -> list[Any]:
    return page.find_elements(By.CSS_SELECTOR, "article.assistant")


def press(page: Any, *keys: str) -> None:
    """Type into whatever has the focus."""
    page.switch_to.active_element.send_keys(*keys)


def test_the_page_shows_what_runs(page: Any, server: Server) -> None:
    facts = server.info()
    assert by_id(page, "model").text == "tiny-moe"
    assert by_id(page, "kernel").text == facts["kernel"]
    taken = [path["taken"] for path in facts["fast_paths"]]
    summary = page.find_element(By.CSS_SELECTOR, "#paths summary")
    assert summary.text == f"{sum(taken)} of {len(taken)} fast paths taken"
    summary.click()
    shown = page.find_element(By.CSS_SELECTOR, "#paths ul").text
    for path in facts["fast_paths"]:
        assert f"{path['name']}: {'yes' if path['taken'] else 'no'}" in shown
        assert path["taken"] or path["reason"] in shown
    assert "experts" in by_id(page, "memory").text and "MB" in by_id(page, "memory").text


def test_a_question_by_keyboard_alone(page: Any, server: Server) -> None:
    """Enter sends, Shift+Enter begins a line, the answer grows while it comes, Esc stops it,
    and the server stops too.
    """
    assert page.switch_to.active_element.get_attribute("id") == "prompt"
    press(page, "Why", Keys.SHIFT + Keys.ENTER, Keys.NULL, "so?")
    assert by_id(page, "prompt").get_property("value") == "Why\nso?"
    press(page, Keys.ENTER)
    until(page, lambda: len(answers(page)) == 1 and len(answers(page)[0].text) > 40)
    first = answers(page)[0].text
    until(page, lambda: len(answers(page)[0].text) > len(first))
    assert by_id(page, "stop").is_displayed() and not by_id(page, "send").is_displayed()
    assert "tokens/s" in by_id(page, "speed").text
    press(page, Keys.ESCAPE)
    until(page, lambda: "stopped" in answers(page)[0].find_element(By.CLASS_NAME, "note").text)
    assert by_id(page, "send").is_displayed()
    assert page.find_element(By.CSS_SELECTOR, "article.user").text == "Why\nso?"
    server.settle()
    assert page.switch_to.active_element.get_attribute("id") == "prompt"
    press(page, Keys.SHIFT + Keys.TAB, Keys.NULL)  # back from the text, past the log, to the header
    order = []
    for _ in range(4):
        order.append(page.switch_to.active_element.get_attribute("id"))
        press(page, Keys.SHIFT + Keys.TAB, Keys.NULL)
    assert "new" in order


def test_new_chat_empties_the_conversation(page: Any, server: Server) -> None:
    press(page, "One", Keys.ENTER)
    until(page, lambda: len(answers(page)) == 1 and answers(page)[0].text)
    by_id(page, "new").send_keys(Keys.ENTER)
    until(page, lambda: not answers(page) and by_id(page, "empty").is_displayed())
    assert page.switch_to.active_element.get_attribute("id") == "prompt"
    server.settle()
    assert page.execute_script("return messages.length") == 0


def test_errors_are_shown_and_the_question_is_not_kept(page: Any) -> None:
    page.execute_script("arguments[0].value = 'xq '.repeat(20000); resize()", by_id(page, "prompt"))
    press(page, Keys.ENTER)
    note = until(
        page, lambda: answers(page) and answers(page)[0].find_elements(By.CLASS_NAME, "error")
    )
    assert "context is 16384 tokens" in note[0].text
    assert page.execute_script("return messages.length") == 0
    page.get_log("browser")  # Chromium's own line about the 400


def test_what_a_model_writes_never_becomes_html(page: Any) -> None:
    text = (
        "<img src=x onerror=\"document.title='hacked'\"> and "
        "`<b>`\n\n```html\n<script>1</script>\n```\nend\n\n```\nopen"
    )
    page.execute_script(
        "const b = bubble('assistant', ''); b.body.id = 'made'; render(b.body, arguments[0])", text
    )
    made = by_id(page, "made")
    tags = page.execute_script(
        "return [...document.querySelectorAll('#made *')].map(e => e.tagName)"
    )
    assert set(tags) == {"P", "CODE", "PRE"}
    assert [c.text for c in made.find_elements(By.CSS_SELECTOR, "pre code")] == [
        "<script>1</script>",
        "open",
    ]
    assert "<img src=x" in made.find_elements(By.TAG_NAME, "p")[0].text
    assert "hacked" not in page.title
    assert ".innerHTML" not in page.page_source


def test_the_dashboard_by_keyboard_alone(page: Any, server: Server) -> None:
    """Opened and left by keys; its figures are the server's, experts are counted while it is
    open.
    """
    button = by_id(page, "look")
    assert button.get_attribute("aria-expanded") == "false"
    assert not by_id(page, "dashboard").is_displayed()
    button.send_keys(Keys.ENTER)
    until(page, lambda: "8 experts (across)" in by_id(page, "heatnote").text)
    assert not by_id(page, "log").is_displayed()
    made = server.info()["generated_tokens"]
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "ignore_eos": True}
    assert server.request("/v1/completions", body)[0] == 200
    page.execute_script("refresh()")
    tiles = by_id(page, "tiles")
    until(page, lambda: f"{made + 6:,}" in tiles.text)
    counted = server.request("/v1/ktk/experts")[1]
    assert counted["passes"] >= 6 and [sum(row) for row in counted["counts"]] == [2 * (4 + 5)] * 2
    assert f"in {counted['passes']} passes" in by_id(page, "heatnote").text
    facts = server.info()
    assert f"of {facts['kv_cache_pages']:,}" in by_id(page, "pages").text
    runs = by_id(page, "runs").text
    assert facts["kernel"] in runs and all(path["name"] in runs for path in facts["fast_paths"])
    assert by_id(page, "memories").text.count("MB") + by_id(page, "memories").text.count("GB") >= 5
    by_id(page, "heat").send_keys(Keys.ARROW_RIGHT)
    press(page, Keys.ARROW_RIGHT)
    uses = counted["counts"][0][1]
    assert f"Layer 0, expert 1: {uses} uses" in by_id(page, "heatnote").text
    press(page, Keys.ESCAPE)
    assert by_id(page, "log").is_displayed() and not by_id(page, "dashboard").is_displayed()
    assert page.switch_to.active_element.get_attribute("id") == "look"


def test_dark_light_and_narrow(page: Any) -> None:
    def background() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        colours.append(background())
    assert len(set(colours)) == 2
    size = {"width": 340, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wide = "return document.documentElement.scrollWidth"
        assert page.execute_script(wide) <= 340
        assert by_id(page, "prompt").size["width"] > 150
        assert by_id(page, "send").is_displayed()
        page.execute_script("show(true)")
        until(page, lambda: by_id(page, "runs").text)
        assert page.execute_script(wide) <= 340
        widest = (
            "return Math.max(...[...document.querySelectorAll('.card')].map(c => c.scrollWidth))"
        )
        assert page.execute_script(widest) <= 340
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_server_with_a_key_asks_for_it(browser: Any, model: Path) -> None:
    with serving(model, key="s3cret") as own:
        browser.get(own.url + "/")
        until(browser, lambda: by_id(browser, "key").is_displayed())
        press(browser, "wrong", Keys.ENTER)
        until(browser, lambda: "wrong" in by_id(browser, "status").get_attribute("textContent"))
        press(browser, "s3cret", Keys.ENTER)
        until(browser, lambda: by_id(browser, "prompt").is_displayed())
        assert by_id(browser, "model").text == "tiny-moe"
        press(browser, "Hi", Keys.ENTER)
        until(browser, lambda: answers(browser) and answers(browser)[0].text)
        browser.get_log("browser")  # Chromium's own lines about the 401s
        browser.get("about:blank")
