"""The page in a real browser, wide and narrow: a picture is captioned by both arms, and what a model says is text.

Runs where Playwright and a Chromium are installed: `make browser`.
"""

import shutil

import pytest

pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("uvicorn", reason="--mode=serve needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by Playwright: make browser")

from served import world as world  # noqa: E402 the fixtures
from test_progress import STAGE, going_on, steps, write  # noqa: E402
from test_progress import workdir as workdir  # noqa: E402
from test_serve_watching import following as following  # noqa: E402

BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def answered(page):
    page.click("#send")
    page.wait_for_selector(".turn")  # is there, and the button off, before the click returns
    page.wait_for_selector("#send:not(:disabled)", timeout=120_000)


def test_a_picture_is_captioned_by_both_arms_wide_and_narrow(world, browser, tmp_path):
    said = {arm: run.caption(world.pictures[0])[0] for arm, run in world.runs.items()}
    world.pictures[0].save(tmp_path / "picture.png")
    (world.inputs.workdir / "report.html").write_text("<title>the report</title>")
    problems = []
    with world.listening(api_key="secret") as (_, address):
        for width, height in SIZES.values():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("pageerror", lambda error: problems.append(error))
            page.goto(address)
            page.fill("#key input", "secret")
            page.click("#key button")
            page.wait_for_selector("#main:not([hidden])")
            page.click("#send")
            assert page.inner_text("#problem") == "Choose a picture first."
            page.set_input_files("#file", tmp_path / "picture.png")
            page.wait_for_selector("#picture:not([hidden])")
            answered(page)
            assert page.is_hidden("#problem"), page.inner_text("#problem")
            texts = dict(
                zip(page.locator(".answer h3").all_inner_texts(), page.locator(".answer p").all(), strict=True)
            )
            assert {arm: place.inner_text().strip() for arm, place in texts.items()} == said
            assert page.locator("td").count() == 4  # each answer's likelihood under each arm
            assert page.locator("#nearest figure").count() == 8  # four training samples of loss_IE and of loss_ST
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            with page.context.expect_page() as report:
                page.click("#report")
            report.value.wait_for_load_state()
            assert report.value.title() == "the report"
            page.close()
    assert not problems


def test_what_a_model_says_is_text(world, browser, tmp_path, monkeypatch):
    world.pictures[0].save(tmp_path / "picture.png")
    evil = "<img src=x onerror=\"document.title='owned'\">"
    monkeypatch.setattr("eim_jax.serving.text_stream.TextStream.feed", lambda self, tokens, last=False: self._say(last))
    monkeypatch.setattr("eim_jax.serving.text_stream.TextStream._say", _say(evil), raising=False)
    with world.listening() as (_, address):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#main:not([hidden])")
        page.set_input_files("#file", tmp_path / "picture.png")
        page.wait_for_selector("#picture:not([hidden])")
        answered(page)
        assert page.locator(".answer p").first.inner_text() == evil
        assert page.locator(".answer img").count() == 0 and page.title() != "owned"
        page.close()


def test_the_report_renews_itself_and_stays_where_it_is_read(workdir, following, browser):
    with going_on(workdir):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{following}/report")
        page.wait_for_selector("#progress:not(:empty)")
        assert "step 120 of 400" in page.inner_text("#progress")
        page.click("summary")
        read = page.locator("h4", has_text="Stage 2 · ie")
        read.evaluate("node => node.scrollIntoView({ behavior: 'instant' })")
        top, scrolled = read.bounding_box()["y"], page.evaluate("scrollY")
        steps(workdir / "eim", "ie", 1, 400)
        write(workdir / "eim" / "run.json", {"stages": [{"name": n, "steps": 20, **STAGE} for n in ("st", "ie")]})
        page.wait_for_selector("th:has-text('2 · ie')", timeout=30_000)
        assert page.locator("details[open]").count() == 1
        assert page.evaluate("scrollY") > scrolled  # the new row stands above
        assert read.bounding_box()["y"] == pytest.approx(top, abs=2)
        page.close()


def test_an_arm_that_comes_leaves_what_is_there(world, browser, tmp_path):
    world.pictures[0].save(tmp_path / "picture.png")
    with world.listening() as (server, address):
        pending = server._service.pending
        pending["eim"] = "stage ie of arm eim is not finished"
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#main:not([hidden])")
        assert page.inner_text("#coming") == pending["eim"] and page.locator("#arms input").count() == 1
        page.set_input_files("#file", tmp_path / "picture.png")
        page.wait_for_selector("#picture:not([hidden])")
        page.click("summary")
        page.fill("#most", "3")
        answered(page)
        said = page.inner_text(".turn")
        del pending["eim"]
        page.wait_for_selector("#arms input[value=eim]", timeout=30_000)
        assert page.is_hidden("#coming") and page.is_visible("#picture")
        assert page.input_value("#most") == "3" and page.inner_text(".turn") == said
        page.close()


def _say(text):
    def say(stream, last):
        stream.text = text if last else ""
        return stream.text

    return say
