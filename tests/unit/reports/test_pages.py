"""The HTML pages as a browser shows them: on a phone and on a wide screen, in the light and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mgq.engine.classifier.dump import dump_classifier
from mgq.ptq.sensitivity import sensitivity_of
from mgq.reports.analysis_page import page_of
from mgq.reports.report import report
from tests.conftest import classifier_of, smooth_images, trio_of, write_images
from tests.fakes.analyses import analysis_of
from tests.fakes.finished_runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

ARCH = "shufflenet_v1_x0_5_g3"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = {"phone": (390, 844), "wide": (1280, 900)}
SEEN = """() => {
  const box = (one) => one.getBoundingClientRect();
  const all = (what) => [...document.querySelectorAll(what)];
  return {
    title: document.title,
    lang: document.documentElement.lang,
    headings: all('h1, h2').map((one) => one.textContent),
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    broken: all('img').filter((one) => !(one.complete && one.naturalWidth > 0 && one.alt)).length,
    images: all('img').length,
    flat: all('svg').filter((one) => !(box(one).width > 0 && box(one).height > 0)).length,
    lines: all('.curves > svg polyline').filter((one) => box(one).width > 0).length,
    scopeless: all('th:not([scope])').length,
    paper: getComputedStyle(document.body).backgroundColor,
    stranger: document.querySelector('script, main [onerror]') !== null,
  };
}"""
CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const bright = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    let shades = [];
    for (; one; one = one.parentElement) {
      const [r, g, b, a = 1] = parts(getComputedStyle(one).backgroundColor);
      shades.push([r, g, b, a]);
      if (a === 1) break;
    }
    return 'rgb(' + shades.reverse().reduce((under, [r, g, b, a]) =>
      [r, g, b].map((v, i) => a * v + (1 - a) * under[i]), [255, 255, 255]).join() + ')';
  };
  let worst = [99, ''];
  const words = 'p, td, th, dt, dd, li, figcaption, caption, summary, h1, h2, h3, code, a';
  for (const one of document.querySelectorAll(words)) {
    if (!one.textContent.trim()) continue;
    const [x, y] = [bright(getComputedStyle(one).color), bright(behind(one))];
    const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    if (ratio < worst[0]) worst = [ratio, one.tagName + ': ' + one.textContent.slice(0, 40)];
  }
  return worst;
}"""


class Watched:
    """A browser's tab, and all that it complained of or asked for besides the page itself."""

    def __init__(self, tab: Page) -> None:
        self.tab = tab
        self.complaints: list[str] = []
        self.requests: list[str] = []
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))

    def seen(self, path: Path, size: str, scheme: Any = "light") -> dict[str, Any]:
        """What is to be seen of the page ``path``; fails where it complains, or wants more than itself."""
        self.complaints.clear()
        self.requests.clear()
        width, height = SIZES[size]
        self.tab.set_viewport_size({"width": width, "height": height})
        self.tab.emulate_media(color_scheme=scheme)
        self.tab.goto(path.as_uri())
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]
        found: dict[str, Any] = self.tab.evaluate(SEEN)
        return {**found, "contrast": self.tab.evaluate(CONTRAST)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium to look at pages with: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=ARGUMENTS.split(), headless=True
        )
        yield Watched(context.new_page())
        context.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium to look at pages with: apt-get install chromium")
    root = tmp_path_factory.mktemp("pages")
    (root / "val").mkdir()
    found = sensitivity_of(trio_of(ARCH).qat, smooth_images(2), np.array([1, 2]))
    analysis = root / "analysis.html"
    analysis.write_text(page_of(analysis_of(found)), encoding="utf-8")
    dump_classifier(classifier_of(ARCH), root / "net.onnx", batch=None)
    for number in range(2):
        write_images(root / "val" / f"kind {number}", 4)
    file = report(root / "net.onnx", root, engines=False, output=root / "file.html").page
    return {"report": report(make_run(root), engines=False).page, "file report": file, "analysis": analysis}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["report", "file report", "analysis"])
def test_a_page_is_whole_in_a_browser_and_fits_its_width(
    browser: Watched, pages: dict[str, Path], name: str, size: str
) -> None:
    seen = browser.seen(pages[name], size)
    assert seen["title"].endswith(name.split()[-1]) and seen["lang"] == "en"
    assert seen["overflow"] <= 0, seen
    assert seen["broken"] == 0 and seen["flat"] == 0 and seen["scopeless"] == 0 and not seen["stranger"], seen
    if name == "report":
        for heading in ("Accuracy", "Training", "Answers that int8 changed", "What is taken for what"):
            assert heading in seen["headings"]
        assert seen["images"] > 0 and seen["lines"] > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "file report", "analysis"])
def test_words_stand_out_in_the_light_and_in_the_dark(
    browser: Watched, pages: dict[str, Path], name: str, scheme: str
) -> None:
    seen = browser.seen(pages[name], "wide", scheme)
    assert (seen["paper"] == "rgb(255, 255, 255)") == (scheme == "light")
    assert seen["contrast"][0] >= 4.5, seen["contrast"]
