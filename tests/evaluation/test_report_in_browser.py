"""The page in a real Chromium: offline, in both themes, as wide as a phone, by keyboard alone."""

import shutil

import pytest

from lowbit.evaluation.report.facts import facts_of
from lowbit.evaluation.report.page import render, render_comparison
from tests.e2e.cli import run_quantize

pytestmark = pytest.mark.browser
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# WCAG 2's contrast of an element's text with the first ground behind it that is not transparent.
CONTRAST = """element => {
  const parse = text => { const c = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    c.fillStyle = text; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => { const f = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  let behind = element, ground = [255, 255, 255, 255];
  for (; behind; behind = behind.parentElement) {
    const colour = parse(getComputedStyle(behind).backgroundColor);
    if (colour[3] > 250) { ground = colour; break; }
  }
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
}"""


@pytest.fixture(scope="module")
def pages(models, int4, tmp_path_factory):
    """The page of a calibrated checkpoint, and one of two side by side."""
    folder = tmp_path_factory.mktemp("pages")
    output = folder / "llama-awq"
    args = ("--method", "awq", "--group-size", 64, "--num-samples", 4, "--seqlen", 32)
    done = run_quantize(models("llama")[1], *args, "--eval-windows", 2, "-o", output)
    assert done.code == 0, done.err
    facts = [facts_of(output), facts_of(int4)]
    paths = {"checkpoint": folder / "report.html", "comparison": folder / "comparison.html"}
    paths["checkpoint"].write_text(render(facts[0], "html"))
    paths["comparison"].write_text(render_comparison(facts, "html"))
    return paths


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, pages):
    """(which page, options of the window) -> the page, opened from disk; it must ask for nothing and log nothing."""
    contexts, complaints = [], []

    def open_page(which: str, **options):
        usual = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        context = chromium.new_context(**usual | options)
        context.set_default_timeout(120_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(pages[which].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.mark.parametrize("which", ["checkpoint", "comparison"])
@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_is_wider_than_the_window(opened, which, width):
    page = opened(which, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    edges = page.locator(".card").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(b => [b.x, b.right])"
    )
    assert edges
    for left, right in edges:
        assert 0 <= left < right <= width + 1


@pytest.mark.parametrize("which", ["checkpoint", "comparison"])
def test_every_figure_is_drawn_and_named(opened, which):
    page = opened(which)
    look = "e => [e.getAttribute('aria-label'), e.getBoundingClientRect().width, e.getBoundingClientRect().height]"
    figures = page.locator("svg:visible").evaluate_all(f"all => all.map({look})")
    assert len(figures) == {"checkpoint": 4, "comparison": 1}[which]
    for label, width, height in figures:
        assert label
        assert width > 200
        assert height > 80


SIZES = """all => all.map(text => parseFloat(getComputedStyle(text).fontSize) *
  text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width)"""


@pytest.mark.parametrize("which", ["checkpoint", "comparison"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_all_text_of_all_figures_has_one_size(opened, which, width):
    sizes = opened(which, viewport={"width": width, "height": 800}).locator("svg:visible text").evaluate_all(SIZES)
    assert len(sizes) > 10
    assert 11.4 <= min(sizes) <= max(sizes) <= 13.5, (min(sizes), max(sizes))
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("which", ["checkpoint", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(opened, which, scheme):
    page = opened(which, color_scheme=scheme)
    for selector in (
        "h1",
        ".lead",
        ".note",
        "td",
        "th",
        ".tile .more",
        ".tile s",
        ".bar nav a",
        ".flag",
        "footer",
        "summary",
    ):
        for contrast in page.locator(selector).evaluate_all(f"all => all.slice(0, 3).map({CONTRAST})"):
            assert contrast >= 4.5, (selector, scheme)
    ink = page.locator("svg text").first.evaluate("element => getComputedStyle(element).fill")
    assert ink != "rgb(0, 0, 0)"


def test_the_theme_follows_the_system_and_the_button(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened("checkpoint", color_scheme="light"), opened("checkpoint", color_scheme="dark")
    bright, dim = light.evaluate(ground), dark.evaluate(ground)
    assert bright != dim
    light.locator("#theme").press("Enter")
    assert light.evaluate(ground) == dim
    light.locator("#theme").press("Space")
    assert light.evaluate(ground) == bright
    dark.locator("#theme").click()
    assert dark.evaluate(ground) == bright


FOCUS = """() => {
  const element = document.activeElement;
  return [element.getAttribute("aria-label") || element.textContent.trim(), getComputedStyle(element).outlineStyle];
}"""


def test_by_keyboard_alone(opened):
    page = opened("checkpoint")
    reached: list[str] = []
    while "The recipe" not in reached:  # beyond the end the window itself has the focus
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUS)
        assert outline != "none", name
        reached.append(name)
        assert len(reached) < 40, reached
    assert reached[0] == "To the content"
    assert reached[1:6] == ["Use", "Size", "Quality", "Errors", "Recipe"]
    for name in ("Switch between light and dark", "The worst tokens", "The numbers", "Errors by block", "copy"):
        assert name in reached
    page.locator("summary").first.press("Enter")
    assert page.locator("details table").first.is_visible()
    page.locator("nav a", has_text="Recipe").press("Enter")
    assert page.evaluate("location.hash") == "#recipe"
    assert page.evaluate("document.querySelector('#recipe').getBoundingClientRect().top < innerHeight")


def test_it_prints_what_it_copies(opened):
    page = opened("checkpoint")
    page.locator("[data-copy=command]").click()
    page.wait_for_function("document.querySelector('[data-copy=command]').textContent !== 'copy'", polling=50)
    assert "quantize model --recipe recipe.toml" in page.locator("#command").text_content()


def test_one_program_s_commands_show_at_a_time(opened):
    page = opened("checkpoint")
    assert page.locator(".panel:visible").all_inner_texts()[0].startswith("vllm serve llama-awq")
    page.locator(".switch input").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    [shown] = page.locator(".panel:visible").all_inner_texts()
    assert 'lowbit.load("llama-awq")' in shown
