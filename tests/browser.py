"""A real headless Chromium for the tests of the dashboard: what it asked for, what it complained of, how it looks."""

import base64
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no chromium and chromedriver on the PATH (Debian: apt install chromium chromium-driver)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip

# Rectangles of all visible text, in HTML and in SVG, that overlap another's by more than a pixel; hints are not shown yet.
OVERLAPS = """
const boxes = [], cut = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, parent = node.parentElement;
  if (!node.data.trim() || parent.closest("script, style, .skip, [aria-hidden=true]")) continue;
  const style = getComputedStyle(parent);
  if (style.visibility === "hidden" || !parent.checkVisibility()) continue;
  const scroll = parent.closest(".scroll");
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const r of range.getClientRects()) {
    if (r.width < 1 || r.height < 1) continue;
    if (scroll && r.bottom > scroll.getBoundingClientRect().bottom) continue;
    const slack = parent.closest("svg") ? 3 : 2;  // of a line box, above and below the letters
    const frame = parent.closest(".main-svg")?.getBoundingClientRect();
    if (frame && (r.left < frame.left - 1 || r.right > frame.right + 1)) cut.push("cut: " + node.data.trim().slice(0, 40));
    const text = node.data.trim().slice(0, 40);
    boxes.push({text, node: parent, l: r.left, r: r.right, t: r.top + slack, b: r.bottom - slack});
  }
}
const found = [];
for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
  const a = boxes[i], b = boxes[j];
  if (a.node === b.node) continue;
  const across = Math.min(a.r, b.r) - Math.max(a.l, b.l), down = Math.min(a.b, b.b) - Math.max(a.t, b.t);
  if (across > 1 && down > 1) found.push(a.text + " | " + b.text);
}
const width = document.documentElement.clientWidth;
const wide = boxes.filter((x) => x.l < -1 || x.r > width + 1).map((x) => "sticks out: " + x.text);
return [boxes.length, found.concat(wide, cut)];
"""


def needed():
    """Skip a test where there is no browser; fail it where there has to be one, as in CI."""
    if CHROMIUM is None or DRIVER is None:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(MISSING)


class Browser:
    """One headless Chromium. Close it."""

    def __init__(self):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        self.profile = tempfile.mkdtemp(prefix="chromium-")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, url, width=1280, height=900, dark=False):
        """Load a page at a size, in light or dark; forget what was asked and said before."""
        self.driver.get("about:blank")
        self.driver.get_log("performance"), self.driver.get_log("browser")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        theme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)
        self.driver.get(url)

    def wait(self, script, seconds=15):
        """Until a script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda d: d.execute_script(script))

    def asked(self):
        """Every address that was asked for since `open`."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def errors(self):
        """What the console said at level SEVERE since the last look."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def overlaps(self):
        """Number of pieces of text, and those that overlap or stick out once the figures have taken their places."""
        ends = time.monotonic() + 5
        while (found := self.driver.execute_script(OVERLAPS))[1] and time.monotonic() < ends:
            time.sleep(0.1)
        return found

    def picture(self, path):
        """The whole page as a PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)
