import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "browser" / "chromium.sh"
WATCH = "window.hits = 0; window.hit = window.alert = () => { window.hits += 1; };"


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium without a window; ``window.hits`` counts calls of ``hit`` and ``alert``."""
    # In continuous integration, a browser that cannot be tested with is an error, not an excuse.
    give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    try:
        from selenium import webdriver
    except ModuleNotFoundError as error:
        give_up(f"{error}: pip install 'molf[test]'")
    installed = subprocess.run([INSTALL], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if installed.returncode != 0:
        give_up(installed.stderr.strip())
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # The sandbox does not work for root, whom containers run tests as; the page is our own.
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        yield driver
    finally:
        driver.quit()
