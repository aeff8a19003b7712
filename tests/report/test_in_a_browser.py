"""Reports in a real Chromium: no error and no request, everything that is drawn has marks, and no words lie over each other."""

from pathlib import Path

import pytest

REPORTS = ("hf", "fp8", "ranks", "bad-hf", "bad-fp8")
WIDTHS = (1280, 390)
MARKS = """
[...document.querySelectorAll('svg[role=img]')].filter(svg => svg.checkVisibility()).map(svg =>
  [...svg.querySelectorAll('path, rect, circle, image')].filter(mark => {
    const box = mark.getBoundingClientRect(); return box.width > 0 || box.height > 0 }).length)
"""
OVERLAPS = """
[...document.querySelectorAll('svg[role=img]')].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const words = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]), found = [];
  words.forEach(([a, p], at) => words.slice(at + 1).forEach(([b, q]) => {
    const over = (x, y, w, h) => Math.min(p[x] + p[w], q[x] + q[w]) - Math.max(p[x], q[x]);
    if (over('left', 0, 'width') > 1 && over('top', 0, 'height') > 3) found.push(a + ' | ' + b) }));
  return found })
"""
OUTSIDE = """
[...document.querySelectorAll('svg[role=img] text')].filter(text => text.checkVisibility()).filter(text => {
  const p = text.getBoundingClientRect(), q = text.ownerSVGElement.getBoundingClientRect();
  return p.left < q.left - 1 || p.right > q.right + 1 }).map(text => text.textContent)
"""
UNNAMED = "[...document.querySelectorAll('svg[role=img]')].filter(svg => !(svg.ariaLabel || svg.querySelector('title'))).length"


@pytest.fixture(scope="session")
def reports(damaged):
    from tests.report.reading import call

    for name, source in (("bad-hf", "run"), ("bad-fp8", "hf")):
        assert call("report", damaged / name, damaged / source, "-o", damaged / f"{name}.html").exit_code == 3
    return damaged


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("report", REPORTS)
def test_it_is_drawn_without_a_complaint(browser, reports, report, width, dark):
    page = browser.open(reports / f"{report}.html", width, dark=dark)
    assert page.complaints == []
    assert [url for url in page.asked_for if not url.startswith(("data:image/png", Path(reports).as_uri()))] == []
    marks = page.evaluate(MARKS)
    assert len(marks) >= 1
    assert all(marks)
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(UNNAMED) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    dark_behind = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark_behind == dark


def test_pictures_are_decoded(browser, reports):
    browser.open(reports / "bad-hf.html", 1280)
    assert browser.evaluate("document.querySelectorAll('image').length") == 2
    assert len([url for url in browser.asked_for if url.startswith("data:image/png")]) == 2


def test_a_hostile_name_runs_nothing(browser, reports):
    browser.open(reports / "bad-hf.html", 1280)
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    assert "<script>alert(1)</script>" in browser.evaluate("document.body.innerText")
    assert not [event for event in browser.events if event.get("method") == "Page.javascriptDialogOpening"]


def test_the_pages_own_policy_stops_what_would_be_put_into_it(browser, reports, tmp_path):
    text = (reports / "hf.html").read_text()
    (tmp_path / "put.html").write_text(
        text.replace("</h1>", "</h1><script>document.title = 'ran'</script><p style='color: red'>x</p>")
    )
    browser.open(tmp_path / "put.html", 1280)
    assert browser.evaluate("document.title") == "hf: carnet report"
    assert len(browser.complaints) == 2


def test_it_prints_with_what_is_folded(browser, reports):
    browser.open(reports / "hf.html", 1280)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("document.querySelector('table.streams').checkVisibility()")
    browser.ask("Emulation.setEmulatedMedia", media="screen")
