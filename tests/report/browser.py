"""A headless Chromium without a network, and what a page was in it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

REQUIRE = "MEGAMTP_REQUIRE_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Opened(NamedTuple):
    """The document after its scripts ran, and what they and the network complained of."""

    dom: str
    console: list[str]
    requests: list[str]  # addresses that the page asked for, its own file left out


def chromium() -> str:
    """The browser's path. Skips where there is none, or fails where the environment says that one is required."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no {NAMES[0]} is installed (Debian: apt-get install chromium)"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, but {reason}")
        pytest.skip(reason)
    return path


def open_page(page: Path, profile: Path, *options: str) -> Opened:
    """Load ``page`` from its file, let its scripts run, and look."""
    log = profile / "net.json"
    profile.mkdir()
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=20000",
        f"--log-net-log={log}", *options, "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = re.findall(r"CONSOLE[:(].*", done.stderr)
    started = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    # The browser has requests of its own, which no origin initiated.
    requests = {told["url"] for told in started if told.get("initiator", "not an origin") != "not an origin"}
    return Opened(done.stdout, console, sorted(url for url in requests if not url.startswith("data:")))
