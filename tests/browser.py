"""The page of `igpt web` in headless chromium: `make web-test`, which sets up what it needs. Screenshots: build/web/.

IGPT_WEB_MODEL names the model that is served; by default one that was trained and probed for a moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "build" / "web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def igpt(*argv: str) -> None:
    subprocess.run([sys.executable, "-m", "igpt", *argv, "--device", "cpu"], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    if given := os.environ.get("IGPT_WEB_MODEL"):
        return given
    run = str(tmp_path_factory.mktemp("runs") / "mine")
    few = "--preset tiny --layers 2 --width 64 --size 32 --steps 100 --batch 4 --valid-pictures 8 --sample-every 0"
    igpt("train", "--run", run, *few.split())
    few = "--data builtin:emoji --limit-train 200 --limit-test 50 --C 0.1"
    igpt("probe", "--model", run, "--out", f"{run}/probe", *few.split())
    return run


@contextmanager
def serving(model: str):
    """`igpt web` as a process: yields it and its address."""
    command = [sys.executable, "-m", "igpt", "web", "--model", model, "--port", "0", "--device", "cpu"]
    # A shell's background job, and so its children, would not hear Ctrl-C.
    how = {"cwd": ROOT, "text": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    try:
        said = next((line for line in process.stderr if line.startswith("igpt web: http")), None)
        assert said, "igpt web ended before it served"
        yield process, said.split()[2]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(model):
    with serving(model) as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.exit("web-test: needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)", 2)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--window-size=1280,940", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield driver
    driver.quit()


class Page:
    """What one sees and does."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self["go"].is_enabled())

    def __getitem__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def wait(self, condition):
        return WebDriverWait(self.driver, 120, 0.02).until(lambda _: condition())

    def shot(self, name: str) -> None:
        assert self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def pixels(self, selector: str) -> np.ndarray:
        """A canvas as (side, side, 4)."""
        script = """const c = document.querySelector(arguments[0]);
                    return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"""
        flat = np.array(self.driver.execute_script(script, selector))
        side = round((flat.size // 4) ** 0.5)
        return flat.reshape(side, side, 4)

    def slide(self, name: str, value: float) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.driver.execute_script(script, self[name], value)

    def upload(self, path: Path) -> None:
        self["file"].send_keys(str(path))

    def status(self) -> str:
        return self["status"].text


@pytest.fixture
def page(browser, url) -> Page:
    return Page(browser, url)


@pytest.fixture
def picture(tmp_path) -> Path:
    """A sun over a field, 200 x 160."""
    y, x = np.mgrid[:160, :200]
    image = np.where((y < 100)[..., None], [150, 205, 245], [90, 160, 70])
    image[(y - 60) ** 2 + (x - 100) ** 2 < 40**2] = [250, 200, 50]
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "sun.png")
    return tmp_path / "sun.png"


def test_an_uploaded_picture_is_completed_row_by_row(page, picture):
    page.shot("1-start")
    blank = page.pixels("#editor")
    page.upload(picture)
    page.wait(lambda: not np.array_equal(page.pixels("#editor"), blank))
    whole = page.pixels("#editor")
    side = len(whole)
    assert (whole[: side // 2, :, 3] == 255).all() and (whole[side // 2 :, :, 3] < 128).all()
    page.slide("keep", side // 4)
    assert f"{side // 4} of {side} rows" in page["kept"].text
    assert (page.pixels("#editor")[side // 4 :, :, 3] < 128).all()
    page.shot("2-kept")
    page.slide("count", 8)
    page["go"].click()
    page.wait(lambda: "row" in page.status())
    assert page["go"].text == "Stop"
    half = page.pixels("#complete canvas")
    page.shot("3-while-drawing")
    page.wait(lambda: "seed" in page.status())
    assert page["go"].text == "Complete" and not page["error"].is_displayed()
    figures = page.driver.find_elements(By.CSS_SELECTOR, "#complete canvas")
    assert len(figures) == 8
    done = page.pixels("#complete canvas")
    assert (half[-1, :, 3] == 0).all(), "seen before its last row was there"
    assert (done[..., 3] == 255).all() and np.array_equal(done[: side // 4], whole[: side // 4])
    page.shot("4-completed")


def test_one_draws_and_goes_on_from_a_completion(page):
    blank = page.pixels("#editor")
    page.driver.find_elements(By.CSS_SELECTOR, "#colours button")[2].click()
    page.slide("width", 2)
    for x in (-80, 40):
        line = ActionChains(page.driver, duration=50).move_to_element_with_offset(page["editor"], x, -110)
        line.click_and_hold().move_by_offset(40, 60).move_by_offset(-30, 20).release().perform()
    drawn = page.pixels("#editor")
    assert 6 < (drawn != blank).any(-1).sum() < drawn[..., 0].size / 2
    page.shot("5-drawn")
    page.slide("temperature", 0.5)
    page.slide("count", 3)
    page["go"].click()
    page.wait(lambda: "seed" in page.status())
    done = page.pixels("#complete figure:nth-child(2) canvas")
    page.driver.find_element(By.CSS_SELECTOR, "#complete figure:nth-child(2) button").click()
    assert np.array_equal(page.pixels("#editor")[..., :3], done[..., :3])
    page.shot("6-edit-a-completion")


def test_bad_files_are_refused_in_words(page, tmp_path, picture):
    before = page.pixels("#editor")
    (tmp_path / "notes.txt").write_text("this is no picture")
    page.upload(tmp_path / "notes.txt")
    page.wait(lambda: page["error"].is_displayed())
    assert "none of BMP, GIF, JPEG, PNG, TIFF, WEBP" in page["error"].text
    page.shot("7-bad-file")
    assert np.array_equal(page.pixels("#editor"), before)
    (tmp_path / "large.png").write_bytes(bytes((16 << 20) + 1))
    page.upload(tmp_path / "large.png")
    page.wait(lambda: "large.png has 16,777,217 bytes; at most 16,777,216" in page["error"].text)
    page.upload(picture)
    page.wait(lambda: not page["error"].is_displayed())


def test_it_can_be_stopped_and_started_again(page):
    page["emoji"].click()
    page.slide("keep", 1)
    page.slide("count", 16)
    page["go"].click()
    page.wait(lambda: "row" in page.status())
    page["go"].click()
    page.wait(lambda: "stopped after row" in page.status())
    assert page["go"].text == "Complete" and not page["error"].is_displayed()
    page.slide("count", 1)
    page["go"].click()
    page.wait(lambda: "seed" in page.status())


def test_samples(page):
    page["tab-samples"].click()
    assert not page["editor"].is_displayed()
    page.slide("count", 12)
    page["go"].click()
    page.wait(lambda: "seed" in page.status())
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "#samples canvas")) == 12
    assert (page.pixels("#samples canvas")[..., 3] == 255).all()
    page.shot("8-samples")


def test_the_probes_curve(page, model):
    if not (Path(model) / "probe" / "probe.json").is_file():
        assert not page["tab-probe"].is_displayed()
        return
    page["tab-probe"].click()
    layers = json.loads((Path(model) / "probe" / "probe.json").read_text())["layers"]
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "#curve circle")) == len(layers)
    assert "is the best on validation" in page["probe-said"].text
    page.shot("9-probe")


def test_at_night_and_on_a_telephone(page, picture):
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    page.upload(picture)
    page.slide("count", 4)
    page["go"].click()
    page.wait(lambda: "seed" in page.status())
    page.shot("10-dark")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    narrow = {"width": 400, "height": 1500, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    page.shot("11-narrow")
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 400
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_came_from_elsewhere_and_nothing_failed(page, url):
    """Of all that the tests above have done."""
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked and all(address.startswith((url, "data:")) for address in asked)
    severe = [entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("/picture" in message and "400" in message for message in severe), severe  # the file refused above


def test_when_the_server_ends_the_page_says_so(browser, model):
    with serving(model) as (process, address):
        page = Page(browser, address)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and json.loads(process.stdout.read())["url"] == address
        page["emoji"].click()
        page.wait(lambda: page["error"].is_displayed())
        assert "has it been ended in its terminal?" in page["error"].text
