"""MLflow's pages in a real browser: a finished sweep compared as a person compares it.

Set RAYSCHED_SCREENSHOTS to a folder to keep what the browser showed (`make screenshots`: docs/).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
RUN = """\
name: digits-small
data: {source: digits}
model: {kind: unet, block_out_channels: [8, 16], layers_per_block: 1}
optimizer: {learning_rate: 2.0e-3}
training: {batch_size: 64}
evaluation: {nfe: [5], num_samples: 128}
scaling: {num_workers: 0}
"""
SPACE = """\
name: digits-small
base: run.yaml
budget_forward_equivalents: 30000
space:
  scheduled_sampling.max_step_offset: {randint: [1, 5]}
  scheduled_sampling.probability: {uniform: [0.05, 1.0]}
  scheduled_sampling.grid: {choice: [100, 20]}
search: {algorithm: random, num_samples: 3}
early_stopping: {kind: none}
"""
SWEPT = {f"scheduled_sampling.{key}" for key in ("max_step_offset", "probability", "grid")}
NUM_TRIALS = 4
COMMAND = [sys.executable, "-m", "raysched"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep: the baseline and three trials."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "run.yaml").write_text(RUN)
    (folder / "space.yaml").write_text(SPACE)
    done = subprocess.run(
        [*COMMAND, "tune", "space.yaml", "output_dir=runs/digits-small", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["status"] == "finished"
    return folder / "runs" / "digits-small"


@pytest.fixture(scope="module")
def address(sweep: Path) -> Iterator[str]:
    """The page that `raysched ui` names."""
    process = subprocess.Popen(
        [*COMMAND, "ui", str(sweep), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = ""
        while "(Ctrl-C ends it)" not in said:
            line = process.stderr.readline()
            assert line, f"raysched ui ended: {said}"
            said += line
        (found,) = re.findall(r"http://127\.0\.0\.1\S+", said)
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The sweep's runs with its trials unfolded, in a fresh browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox refuses root; it opens pages of this machine only.
        arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        page.set_default_timeout(60_000)
        # The assistant for language models would cover a third of the page.
        opened = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"
        page.add_init_script(f"localStorage.setItem('{opened}', 'true')")
        page.goto(address)
        row = page.get_by_role("row").filter(has_text="digits-small")
        row.locator("button[data-component-id*=runnamecellrenderer]").first.click()
        for number in range(NUM_TRIALS):
            link_of(page, number).wait_for()
        yield page
        browser.close()


def link_of(page: Any, number: int) -> Any:
    return page.get_by_role("link", name=re.compile(rf"^{number:03d}")).first


def keep(page: Any, name: str, tmp_path: Path) -> None:
    """Take a picture and see that it is small enough for a repository."""
    folder = Path(os.environ.get("RAYSCHED_SCREENSHOTS") or tmp_path)
    path = folder / f"mlflow-{name}.png"
    page.screenshot(path=path)
    assert 10_000 < path.stat().st_size < 200_000


def test_compare_shows_parallel_coordinates_over_the_swept_parameters(
    page: Any, tmp_path: Path
) -> None:
    for number in range(NUM_TRIALS):
        row = page.get_by_role("row").filter(has=link_of(page, number))
        row.get_by_role("checkbox").first.click()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text(f"Comparing {NUM_TRIALS} Runs").wait_for()
    # The final objective instead of the first metric of the list.
    metrics = page.locator(".du-bois-light-select").nth(1)
    metrics.click()
    page.locator(".rc-virtual-list").last.hover()
    option = page.locator("[title='objective/q']").last
    while not option.is_visible():
        page.mouse.wheel(0, 150)
    option.click()
    metrics.locator(
        "[aria-label*=close], .du-bois-light-select-selection-item-remove"
    ).first.click()
    page.keyboard.press("Escape")
    axes = page.locator(".parcoords .axis-title")
    page.wait_for_function(
        "n => document.querySelectorAll('.parcoords .axis-title').length === n", arg=4
    )
    assert set(axes.all_text_contents()) == {*SWEPT, "objective/q"}
    keep(page, "parallel-coordinates", tmp_path)


FULL = "@data-component-id='fullscreen_button_chartcard'"
MENU = "@data-testid='experiment-view-compare-runs-card-menu'"


def press(page: Any, title: str, button: str) -> None:
    """Find a chart by its title and press one of its buttons."""
    page.get_by_placeholder("Search metric charts").fill(f"^{title}$")
    page.locator(f"//*[text()='{title}']/following::button[{button}]").first.click()


def test_the_chart_of_quality_against_compute_has_a_line_per_trial(
    page: Any, tmp_path: Path
) -> None:
    page.goto(f"{page.url}&compareRunsMode=CHART")
    press(page, "by_fe/quality/q", FULL)
    page.get_by_role("dialog").get_by_text("by_fe/quality/q", exact=True).first.wait_for()
    lines = (
        "() => new Set([...document.querySelectorAll('[role=dialog] .scatterlayer path.js-line')]"
        ".map(line => line.getAttribute('d'))).size"
    )
    page.wait_for_function(f"n => ({lines})() === n", arg=NUM_TRIALS)
    ticks = page.locator("[role=dialog] .xaxislayer-above text").all_text_contents()
    assert "30k" in ticks, "the axis is in forward equivalents"
    keep(page, "quality-by-fe", tmp_path)


def test_the_image_grid_shows_the_same_samples_of_all_trials(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 560})
    page.goto(f"{page.url}&compareRunsMode=CHART")
    # Long parameters would make each picture as wide as the page.
    press(page, "samples", MENU)
    page.get_by_role("menuitem", name="Configure").click()
    page.get_by_role("switch").click()
    page.get_by_role("button", name="Save changes").click()
    press(page, "samples", FULL)
    # The slider begins before the first evaluation; at its end is that of the whole budget.
    box = page.get_by_role("dialog").get_by_role("slider").locator("../..").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    loaded = (
        "n => [...document.querySelectorAll('[role=dialog] img')].filter(image => "
        "image.src.includes('samples') && image.src.includes('30000') && "
        "image.naturalWidth > 100).length === n"
    )
    page.wait_for_function(loaded, arg=NUM_TRIALS)
    assert page.get_by_role("dialog").get_by_text("No image logged at this step").count() == 0
    keep(page, "samples", tmp_path)
