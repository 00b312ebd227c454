"""The page in Debian's Chromium, without a screen: as a file and live."""

import json
import os
import shutil
import urllib.parse

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from repo_jax.analysis import Reading
from repo_jax.analysis.page import write_page
from tests.analysis.page.conftest import MAX_TOKENS, begun, reading_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver"

TEXT = "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n"


class Page:
    """A browser, asked and used as the tests need it."""

    def __init__(self):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
            options.add_argument(f"--{option}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(30)

    def command(self, name, **arguments):
        return self.driver.execute_cdp_cmd(name, arguments)

    def open(self, address, width=1300, height=1000, scheme="light"):
        """Opens an address, in a window of some size, and waits until it is read."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.prefer(scheme)
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(address)
        self.wait("models.length > 0")

    def prefer(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def js(self, expression, *arguments):
        return self.driver.execute_script(f"return ({expression})", *arguments)

    def run(self, statements, *arguments):
        return self.driver.execute_script(statements, *arguments)

    def wait(self, expression):
        WebDriverWait(self.driver, 30, 0.05).until(
            lambda _: self.js(expression), f"never came true: {expression}"
        )

    def z(self, panel=0):
        """The positions that are drawn."""
        return self.js(f"[...panels[{panel}].plot.data[0].y]")

    def drawn(self, trace, panel=0):
        """The tokens of one of the traces: 0 all, 1 beside, 2 nearest, 3 selected."""
        return self.js(f"[...panels[{panel}].plot.data[{trace}].x]")

    def tokens(self, name):
        """The tokens of the text that are marked."""
        return self.js(
            f"[...document.querySelectorAll('#tokens .{name}')].map(t => +t.dataset.token)"
        )

    def choose(self, selector, value):
        """As someone does who picks an entry of a list."""
        self.run(
            f"const list = document.querySelector('{selector}'); list.value = '{value}';"
            "list.dispatchEvent(new Event('change', {bubbles: true}))"
        )

    def click(self, x, y):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else dict(button="left", clickCount=1)
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def click_on(self, selector):
        box = "document.querySelector(arguments[0]).getClientRects()[0]"
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.click(*self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})", selector))

    def click_point(self, token, panel=0):
        self.click(*self.place(token, panel))

    def hover_point(self, token, panel=0):
        x, y = self.place(token, panel)
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.wait(f"$('tip').textContent.includes('token {token}\\n')")

    def place(self, token, panel=0):
        """Where a token's point is on the screen."""
        return self.js(
            """((plot, token) => {
              plot.scrollIntoView({block: 'center'});
              const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
              return [box.x + xaxis._offset + xaxis.l2p(token),
                      box.y + yaxis._offset + yaxis.l2p(plot.data[0].y[token])];
            })(panels[arguments[1]].plot, arguments[0])""",
            token,
            panel,
        )

    def press(self, *keys):
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            text = {"text": {"Enter": "\r"}.get(key, key)} if key in (" ", "Enter") else {}
            for kind in ("keyDown", "keyUp"):
                shape = dict(type=kind, key=key, windowsVirtualKeyCode=codes[key])
                self.command("Input.dispatchKeyEvent", **shape, **text)

    def tab_to(self, selector):
        """Presses Tab until an element has the focus."""
        for _ in range(60):
            if self.js("document.activeElement.matches(arguments[0])", selector):
                return
            self.press("Tab")
        pytest.fail(f"Tab does not lead to {selector}")

    def requests(self):
        """Addresses asked for since the page was opened, the page's own included."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        of = lambda method: [m["params"] for m in messages if m["method"] == f"Network.{method}"]
        sent = {p["requestId"]: p["request"]["url"].split("#")[0] for p in of("requestWillBeSent")}
        # Chromium sometimes calls a stream cancelled that was read to its end.
        failed = [p for p in of("loadingFailed") if not p.get("canceled")]
        assert [(sent.get(p["requestId"]), p["errorText"]) for p in failed] == []
        return {*sent.values()} - {"about:blank", "data:,"}

    def errors(self):
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]


def lacks(what):
    """Skips a test, but `make test-browser` is there to run it."""
    (pytest.fail if os.environ.get("REPO_JAX_NEEDS_BROWSER") else pytest.skip)(what)


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        lacks(MISSING)
    page = Page()
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser):
    """The browser; at the end nothing may have gone wrong in it."""
    yield browser
    assert browser.errors() == []


@pytest.fixture(scope="module")
def readings(models):
    return [reading_of(model, TEXT) for model in models]


@pytest.fixture(scope="module")
def file(readings, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, readings)
    return path.as_uri()


@pytest.fixture
def live(port):
    return f"http://127.0.0.1:{port}/"


def nearest(z, token, k=10):
    """Distances of the k nearest, by z."""
    distances = np.delete(np.abs(z.astype(np.float64) - np.float64(z[token])), token)
    return np.sort(distances)[:k]


def hand_made(z, text=None, kinds=("repo",), spans=None, name="made"):
    """A reading with positions float [N, T] in its first layer, a character a token."""
    z = np.asarray(z, np.float32)
    count = z.shape[1]
    spans = np.stack([np.arange(count), np.arange(count) + 1], 1) if spans is None else spans
    positions = np.stack([z] * len(kinds))
    ids = np.zeros(count, np.int32)
    return Reading(name, text or "x" * count, ids, np.int32(spans), kinds, positions)


def write(tmp_path, *readings):
    write_page(tmp_path / "page.html", readings)
    return (tmp_path / "page.html").as_uri()


def test_the_file_opens_offline_with_all_points(page, file, readings):
    page.open(file)
    assert page.requests() == {file}
    for layer, head in ((1, 0), (1, 1), (3, 0)):
        page.choose(".layer", layer)
        page.choose(".head", head)
        np.testing.assert_array_equal(np.float32(page.z()), readings[0].positions[layer, head])
    assert page.js("document.querySelectorAll('.plot .point').length") == len(readings[0].ids)
    page.choose(".layer", 0)
    assert page.z() == list(range(len(readings[0].ids)))
    page.choose(".layer", 2)
    assert "no positions in this layer" in page.js("document.querySelector('.empty').innerText")
    assert not page.js("document.querySelector('.plot').checkVisibility()")


def test_a_click_highlights_in_plot_and_text(page, file, readings):
    page.open(f"{file}#layer=1&head=1&view=global")
    z = readings[0].positions[1, 1]
    highest = int(np.argmax(z))
    page.click_point(highest)
    page.wait("state.token !== null")
    for token in (highest, 20):
        if token != highest:
            page.click_on(f"#tokens [data-token='{token}']")
        assert page.drawn(3) == page.tokens("selected") == [token]
        around = [i for i in range(token - 5, token + 6) if i != token and 0 <= i < len(z)]
        assert page.drawn(1) == page.tokens("beside") == around
        near = page.drawn(2)
        assert sorted(near) == page.tokens("near")
        np.testing.assert_array_equal(
            np.abs(z[near].astype(float) - float(z[token])), nearest(z, token)
        )
    assert f"token {token}, z" in page.js("$('chosen').textContent")


def test_nothing_in_the_text_is_html(page, tmp_path):
    pieces = ["<script>alert(1)</script>", "<b>bold</b>", "<br>", "a\n b", "&lt;", "%{x}"]
    pieces += ['<a href="javascript:alert(2)">link</a>', "<img src=x onerror=alert(3)>", "\u202e"]
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
    text = "".join(pieces)
    name = "<img src=x onerror=alert(4)>"
    page.open(write(tmp_path, hand_made([range(9)], text, spans=spans, name=name)))
    for token, piece in enumerate(pieces[:-1]):
        page.hover_point(token)
        shown = piece.replace(" ", "·").replace("\n", "↵")
        assert page.js("$('tip').textContent").startswith(shown[:40])
        page.click_on(f"#tokens [data-token='{token}']")
        assert page.js("document.querySelector('#tokens .selected').textContent") == piece
    assert page.js("document.querySelector('#tokens [data-token=\"8\"]').textContent") == "[U+202E]"
    made = "document.querySelectorAll('#view script, #view img, #view a, #tip *, #tokens b').length"
    assert page.js(made) == 0
    assert page.js("document.querySelector('.model').innerText") == name


def test_focus_leaves_out_what_is_outside_the_whiskers(page, tmp_path):
    z = [[*range(20), 500, -300, 700]]
    page.open(write(tmp_path, hand_made(z)))
    note = "document.querySelector('.note').textContent"
    assert page.js(note) == "3 points outside the whiskers, 0 to 19: 2 above, 1 below."
    low, high = page.js("panels[0].plot.layout.yaxis.range")
    assert -5 < low < 0 < 19 < high < 25
    page.click_on("[name=view][value=global]")
    low, high = page.js("panels[0].plot.layout.yaxis.range")
    assert low < -300 < 700 < high
    assert "range 1000" in page.js(note)


def test_the_map_shows_ranges_and_correlations(page, file, readings):
    page.open(file)
    cell = "document.querySelector('.map [aria-label^=\"layer 3 RePo, head 1\"]')"
    z = readings[0].positions[3, 1].astype(float)
    range_ = float(page.js(f"{cell}.ariaLabel").split()[-1])
    assert range_ == pytest.approx(np.ptp(z), rel=1e-3)
    page.click_on("[name=by][value=correlation]")
    said = page.js(f"{cell}.ariaLabel").split()[-1].replace("\N{MINUS SIGN}", "-")
    assert float(said) == pytest.approx(np.corrcoef(z, np.arange(len(z)))[0, 1], rel=1e-3, abs=1e-4)
    page.run(f"{cell}.click()")
    np.testing.assert_array_equal(np.float32(page.z()), readings[0].positions[3, 1])
    names = page.js("[...document.querySelectorAll('.map .kind')].map(name => name.textContent)")
    assert names == ["0 RoPE", "1 RePo", "2 NoPE", "3 RePo"]


def test_two_models_share_selection_and_zoom(page, file, readings):
    page.open(file)
    page.click_on("#compare")
    assert page.js("panels.map(panel => panel.chosen.model)") == ["small", "other"]
    page.choose(".panel:nth-child(2) .layer", 2)
    np.testing.assert_array_equal(np.float32(page.z(1)), readings[1].positions[2, 0])
    page.click_point(30, panel=1)
    page.wait("state.token !== null")
    assert page.drawn(3, 0) == page.drawn(3, 1) == page.tokens("selected")
    assert sorted(page.drawn(2, 1)) == page.tokens("near-other")
    page.run("Plotly.relayout(panels[0].plot, {'xaxis.range': [10, 20]})")
    page.wait("'' + panels[1].plot.layout.xaxis.range === '10,20'")
    page.click_on("#compare")
    assert page.js("document.querySelectorAll('.panel').length") == 1


def test_models_that_split_the_text_differently(page, tmp_path):
    pairs = np.stack([np.arange(0, 20, 2), np.arange(2, 21, 2)], 1)
    fine, coarse = (
        hand_made([range(20)], name="fine"),
        hand_made([range(10)], "x" * 20, spans=pairs, name="coarse"),
    )
    page.open(write(tmp_path, fine, coarse) + "#model=fine&model1=coarse&token=7")
    assert (page.drawn(3, 0), page.drawn(3, 1)) == ([7], [3])
    page.click_on(".panel:nth-child(2) .nearest button")
    assert page.drawn(3, 0) == [2 * page.drawn(3, 1)[0]]


def test_models_that_read_to_different_ends(page, tmp_path):
    pairs = np.stack([np.arange(0, 20, 2), np.arange(2, 21, 2)], 1)
    fine, coarse = (
        hand_made([range(20)], name="fine"),
        hand_made([range(10)], "x" * 20, spans=pairs, name="coarse"),
    )
    write_page(tmp_path / "page.html", [fine, coarse], max_tokens=10)
    file = (tmp_path / "page.html").as_uri()
    page.open(f"{file}#model=coarse&model1=fine&token=7")
    assert (page.drawn(3, 0), page.drawn(3, 1), page.drawn(2, 1)) == ([7], [], [])
    beyond = "beyond what this model read"
    assert f"fine none: {beyond}" in page.js("$('chosen').textContent")
    assert beyond in page.js("panels[1].nearest.textContent")
    page.open(f"{file}#model=fine&model1=coarse&token=9")
    assert (page.drawn(3, 0), page.drawn(3, 1)) == ([9], [4])
    near = [token for token in page.drawn(2, 1) if token < 5]
    assert page.tokens("near-other") == sorted(2 * token for token in near)
    page.click_point(7, panel=1)
    page.wait("$('chosen').textContent === 'Token 7 is beyond what fine read.'")
    assert page.tokens("selected") == [9]


def test_keyboard_alone(page, file, readings):
    page.open(file)
    page.tab_to("#theme")
    page.tab_to("[name=view]")
    page.press("ArrowRight")
    assert page.js("state.view") == "global"
    page.tab_to(".map button")
    page.press("ArrowDown", "ArrowDown", "ArrowRight")
    assert page.js("[state.panels[0].layer, state.panels[0].head]") == [3, 1]
    assert page.js("document.activeElement.getAttribute('aria-selected')") == "true"
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.tab_to("#tokens")
    page.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert page.drawn(3) == page.tokens("selected") == [2]
    page.press("ArrowDown")  # the second line begins after 25 characters
    assert page.tokens("selected") == [27]
    page.press("End")
    assert page.tokens("selected") == [len(readings[0].ids) - 1]
    assert page.js("$('chosen').getAttribute('role')") == "status"
    page.press("Escape")
    assert page.tokens("selected") == []


def test_a_phone(page, file, live):
    for address in (f"{file}#token=9", f"{file}#model=small&model1=other&token=9", live):
        page.open(address, width=390, height=844)
        assert page.js("document.documentElement.scrollWidth") == 390
        small = page.js(
            "[...document.querySelectorAll('button, select, label:has(input)')]"
            ".filter(e => e.checkVisibility())"
            ".filter(e => e.getBoundingClientRect().height < 40 "
            "|| e.getBoundingClientRect().width < 40).map(e => e.outerHTML)"
        )
        assert small == []


def test_light_and_dark(page, file):
    light = "rgb(246, 246, 244)"
    ground = "getComputedStyle(document.body).backgroundColor"
    points = "panels[0].plot.data[3].marker.color"
    page.open(f"{file}#token=3", scheme="dark")
    dark, dark_point = page.js(ground), page.js(points)
    assert dark != light
    page.choose("#theme", "light")
    assert page.js(ground) == light
    assert page.js(points) != dark_point
    page.choose("#theme", "auto")
    assert page.js(ground) == dark
    page.prefer("light")
    page.wait(f"{points} !== '{dark_point}'")


def test_a_link_restores_the_view(page, file):
    wanted = "model=other&layer=2&head=1&model1=small&layer1=3&head1=0"
    wanted += "&view=global&by=correlation&token=17"
    page.open(f"{file}#{wanted}")
    assert page.js("location.hash.slice(1)") == wanted
    assert page.drawn(3, 0) == page.drawn(3, 1) == [17]
    assert page.js("document.querySelector('[name=by]:checked').value") == "correlation"
    page.open(f"{file}#model=gone&layer=99&head=-1&view=none&token=1e9")
    assert page.js("state.panels[0]") == {"model": "small", "layer": 3, "head": 0}
    assert "gone" in page.js("$('status').textContent")


@pytest.mark.parametrize("webgl", [True, False])
def test_many_points(page, tmp_path, webgl):
    """With WebGL and without."""
    without = "HTMLCanvasElement.prototype.getContext = () => null"
    if not webgl:
        script = page.command("Page.addScriptToEvaluateOnNewDocument", source=without)
    try:
        page.open(write(tmp_path, hand_made(np.random.default_rng(0).normal(size=(1, 3200)))))
        if webgl and not page.js("WEBGL"):
            lacks("Chromium has no WebGL here")
        kind = page.js("panels[0].plot.data[0].type")
        assert kind == ("scattergl" if webgl else "scatter")
        assert len(page.z()) == 3200
        assert page.js("document.querySelector('.no-webgl')") is None
        page.click_on("#tokens [data-token='100']")
        assert page.drawn(3) == [100]
    finally:
        if not webgl:
            page.command("Page.removeScriptToEvaluateOnNewDocument", **script)


def paste(page, text):
    """Puts a text into the clipboard, and that in place of what is in the form."""
    page.command(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.run("return navigator.clipboard.writeText(arguments[0])", text)
    page.run("$('text').focus(); $('text').select()")
    key = dict(key="v", code="KeyV", windowsVirtualKeyCode=86, modifiers=2)
    page.command("Input.dispatchKeyEvent", type="keyDown", commands=["paste"], **key)
    page.command("Input.dispatchKeyEvent", type="keyUp", **key)
    page.wait("$('text').value.length > 0")


def test_the_live_page_reads_what_is_typed(page, live, models):
    page.open(live)
    page.click_on("#read")
    assert "no text yet" in page.js("$('status').textContent")
    hostile = f"{TEXT}<script>alert(1)</script> \U0001f600 é"
    paste(page, hostile)
    page.click_on("#read")
    page.wait("readings.size === 1")
    expected = reading_of(models[0], hostile)
    np.testing.assert_array_equal(np.float32(page.z()), expected.positions[1, 0])
    assert page.js("document.querySelectorAll('#view script').length") == 0
    page.click_on("#compare")
    page.wait("readings.size === 2")
    page.choose(".panel:nth-child(2) .layer", 2)
    expected = reading_of(models[1], hostile)
    np.testing.assert_array_equal(np.float32(page.z(1)), expected.positions[2, 0])
    assert page.requests() == {live, f"{live}api/models", f"{live}api/read"}


def test_100_000_characters_are_pasted(page, live):
    page.open(live)
    text = "<b>0123456\n" * 9090 + "end"
    paste(page, text)
    page.click_on("#read")
    page.wait("readings.size === 1")
    assert len(page.z()) == page.js("shown.length") == MAX_TOKENS
    assert f"{MAX_TOKENS:,} tokens of {len(text):,}" in page.js("$('cut').textContent")
    page.run("$('tokens').focus()")
    page.press("ArrowRight", "End")
    assert page.tokens("selected") == [MAX_TOKENS - 1]
    paste(page, text * 2)
    page.click_on("#read")
    page.wait("$('status').textContent.includes('up to 120,000')")
    assert all("413" in error for error in page.errors())  # as Chromium notes a refusal
    still_works(page, text)


def still_works(page, text):
    """Someone looks around in a text whose tokens are its characters, while it is shown."""
    count = min(len(text), MAX_TOKENS)
    page.click_on("[name=view][value=global]")
    assert page.js("panels[0].plot.checkVisibility()")
    assert len(page.z()) == page.js("shown.length") == count
    page.click_on("#tokens [data-token='3']")
    page.click_on("#next")
    assert page.drawn(3) == page.tokens("selected") == [4]
    assert page.js("$('chosen').querySelector('b').textContent") == text[4]
    page.hover_point(4)
    assert page.js("$('tip').textContent").startswith(f"{text[4]}\n")
    page.click_on("[name=view][value=focus]")


def test_a_live_link_has_the_text(page, live):
    page.open(live)
    paste(page, TEXT)
    page.click_on("#read")
    page.wait("readings.size === 1")
    page.choose(".head", 1)
    page.click_on("#tokens [data-token='11']")
    page.run("navigator.clipboard.writeText = async link => { window.copied = link; }")
    page.click_on("#share")
    page.wait("window.copied")
    link = page.js("window.copied")
    assert link == page.js("location.href")
    page.open(link)
    page.wait("readings.size === 1")
    assert page.js("text") == TEXT
    assert (page.js("state.panels[0].head"), page.drawn(3)) == (1, [11])
    assert page.js("location.href") == link
    page.click_on("#tokens [data-token='12']")
    page.driver.refresh()
    page.wait("readings.size === 1")
    assert (page.js("text"), page.drawn(3)) == (TEXT, [12])
    incompressible = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 3400)))
    paste(page, incompressible)
    page.click_on("#read")
    page.wait("readings.size === 1 && text.length === 3400")
    page.run("navigator.clipboard.writeText = async link => { window.copied = link; }")
    page.click_on("#share")
    page.wait("$('status').textContent.includes('too long for a link')")
    assert "text" not in urllib.parse.parse_qs(urllib.parse.urlsplit(page.js("copied")).fragment)
    assert page.js("copied === location.href")
    page.run("window.before = true; location.href = arguments[0]", link)
    page.wait("!window.before && readings.size === 1")
    assert (page.js("text"), page.js("location.href")) == (TEXT, link)


def test_a_text_stays_until_the_next_is_read(page, live, models, gate):
    first, second = TEXT, f"holds {TEXT}"
    page.open(live)
    paste(page, first)
    page.click_on("#read")
    page.wait("readings.size === 1")
    paste(page, second)
    page.click_on("#read")
    page.wait("$('status').textContent.includes('small is reading')")
    still_works(page, first)
    address = page.js("location.href")
    page.click_on("#stop")
    page.wait("$('status').textContent === 'Stopped.'")
    still_works(page, first)
    page.click_on("#read")
    page.wait("$('stop').checkVisibility()")
    page.choose(".model", "other")  # has read neither
    gate.opened.set()
    page.wait("panels[0].reading && $('stop').hidden")
    assert page.js("[text, state.token]") == [second, None]
    page.choose(".layer", 2)
    expected = reading_of(models[1], second)
    np.testing.assert_array_equal(np.float32(page.z()), expected.positions[2, 0])
    assert page.js("location.href") != address
    still_works(page, second)


def test_a_waiting_text_shows_its_place(page, live, port, gate):
    held = [begun(port, "hold"), begun(port, "hold")]
    page.open(live)
    paste(page, TEXT)
    page.click_on("#read")
    page.wait("$('status').textContent.includes('2 texts before this one')")
    page.click_on("#stop")
    page.wait("$('status').textContent === 'Stopped.'")
    page.click_on("#read")
    page.wait("$('status').textContent.includes('2 texts before this one')")
    gate.opened.set()
    page.wait("readings.size === 1")
    assert len(page.z()) == len(TEXT)
    assert all(b"done" in response.read() for _, response in held)
