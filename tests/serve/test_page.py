"""The page in a real browser."""

import json
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the extra dev has")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def page(browser, server):
    """The page, and that it asked nobody but the server for anything and had no errors."""
    made = browser.new_page()
    said, asked = [], []
    made.on("console", lambda message: said.append(message.text) if "400" not in message.text else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    made.on("request", lambda request: asked.append(request.url))
    made.goto(server.url)
    made.locator("#model option").first.wait_for(state="attached")
    yield made
    assert said == []
    assert all(url.startswith((server.url, "data:")) for url in asked)
    made.close()


def test_an_image_forms_and_two_bundles_are_compared(page, server):
    page.fill("#prompt", "a red fox")
    page.fill("#seed", "5")
    page.select_option("#other", "single")
    page.click("#go")
    for i in range(2):
        page.get_by_text("done in").nth(i).wait_for(timeout=60_000)
    first, second = page.locator(".result").all()
    assert first.locator("h2").inner_text() == "quad" and second.locator("h2").inner_text() == "single"
    assert first.locator(".strip canvas").count() == 3  # a map for each stage
    assert first.locator(".strip img").count() == 3
    assert first.locator(".steps i.done").count() == 6
    assert "seed 5" in first.inner_text() and "ms" in first.locator("table").inner_text()
    shown = first.locator(".view img").get_attribute("src")
    answer = server.post(prompt="a red fox", seed=5, model="quad").json()
    assert shown == f"data:image/png;base64,{answer['data'][0]['b64_json']}"


def test_an_error_is_shown(page):
    page.fill("#prompt", "x" * 5000)
    page.click("#go")
    page.get_by_text("at most 4000").wait_for()


def test_the_copied_python_makes_the_same_image(page, server, alone, tmp_path, monkeypatch):
    page.fill("#prompt", 'a "red" fox\'s \\ house')
    page.fill("#seed", "8")
    text = page.locator("#python").inner_text()
    monkeypatch.chdir(tmp_path)
    exec(text, {})
    assert (tmp_path / "image.png").read_bytes() == alone('a "red" fox\'s \\ house', 8)


def test_the_copied_curl_has_the_same_body(page):
    page.fill("#prompt", "it's a fox")
    text = page.locator("#curl").inner_text()
    import shlex

    words = shlex.split(text.replace("\\\n", " "))
    body = json.loads(words[words.index("-d") + 1])
    assert body == {"model": "quad", "prompt": "it's a fox", "seed": 1}


def test_nothing_in_the_page_comes_from_elsewhere(server):
    answer = server.http.get("/")
    assert "http://" not in answer.text and "https://" not in answer.text and "src=" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
