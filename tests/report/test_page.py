"""The report page is one self-contained file that never executes its data, and a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files

import pytest
from fabricated import fabricate_run

from open_mythos.report import gather, render
from open_mythos.report.example import MAX_CELLS

NODE, BROWSER = shutil.which("node"), shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "</script><script>alert(1)</script><!-- \u2028 $data & é"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    fabricate_run(path, recipe=EVIL)
    looped = {
        "kind": "looped",
        "loops": [1, 4, 8],
        "mean": [[0.5, 0.9, 1]],
        "low": [[0.4, 0.8, 1]],
        "high": [[0.6, 1, 1]],
    }
    entry = {"parameters": 9, "training_flops": 1e9, "flops_per_token": [8.0], "mean": [0.5], "worst": [0.4]}
    compared = {
        "recipe": EVIL,
        "measure": "accuracy",
        "unit": EVIL,
        "seeds": [0, 1],
        "difficulties": [8],
        "trained_loops": 4,
        "contenders": [looped, looped | {"kind": EVIL, "loops": [4], "mean": [[0.7]]}],
        "entries": [entry | {"name": EVIL}],
        "verdicts": [EVIL],
    }
    (path / "compare.json").write_text(json.dumps(compared))
    return gather(path)


@pytest.fixture(scope="module")
def page(data):
    return render(data)


def scripts(page):
    return re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)


def test_data_is_escaped_and_never_becomes_markup(data, page):
    (attributes, embedded), (plain, _) = scripts(page)
    assert "application/json" in attributes and plain == ""
    assert json.loads(embedded) == json.loads(json.dumps(data)) and EVIL in data["title"]
    assert "<title>&lt;/script&gt;&lt;script&gt;" in page and "alert(1)</script>" not in page
    assert page.count("<!--") == 0 and "\u2028" not in page.partition("<style>")[2]


def test_the_page_loads_no_external_resources(page):
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|import\(", page)
    assert set(re.findall(r"https?://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}, "an SVG name, never fetched"
    assert "default-src 'none'" in page


def test_the_same_run_gives_the_same_page(tmp_path):
    fabricate_run(tmp_path / "run")
    assert render(gather(tmp_path / "run")) == render(gather(tmp_path / "run"))


def test_the_largest_page_stays_below_two_megabytes(data):
    loops = 60
    positions = MAX_CELLS // loops
    whole, decimal = [[100] * positions] * loops, [[0.00123] * positions] * loops
    example = {"predictions": whole, "probability": whole, "change": decimal, "gate": whole}
    assert len(render({**data, "example": data["example"] | example}).encode()) < 2_000_000


def test_nan_in_the_data_is_refused(data):
    with pytest.raises(ValueError):
        render({**data, "facts": [float("nan")]})


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_chart_helper_functions():
    source = files("open_mythos.report").joinpath("charts.js").read_text()
    asked = """
    console.log(JSON.stringify([
      niceTicks(0, 1, 5), logTicks(0.02, 0.3), logTicks(1e-4, 10), thinned([1, 2, 3, 4], (v) => 10 * v, 20),
      runs([1, null, 2, 3], isNumber), heatColour(0), heatColour(1), heatColour(9), digits(1234.5678), digits(null),
      digits(2e-5), percent(0.9996), inkOn([0, 34, 78]), inkOn([254, 232, 56]),
      axisEnds([2, 2.5]), axisEnds([2, 2.01]).map((v) => v.toFixed(4)), axisEnds([3, 3]).map((v) => v.toFixed(2)),
      axisEnds([0.1, 0.2], true), axisEnds([0.6, 0.6], true).map((v) => (v / 0.6) ** 2), axisEnds([], true),
    ]));"""
    done = subprocess.run([NODE, "-e", "const document = {};" + source + asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        [0, 0.2, 0.4, 0.6, 0.8, 1], [0.02, 0.05, 0.1, 0.2], [1e-4, 1e-3, 0.01, 0.1, 1, 10], [2, 4],
        [[0], [2, 3]], [0, 34, 78], [254, 232, 56], [254, 232, 56], "1235", "–",
        "2.00e-5", "100.0%", "#ffffff", "#10131a",
        [2, 2.5], ["1.9045", "2.1055"], ["2.85", "3.15"], [0.1, 0.2],
        [pytest.approx(1 / 1.5), pytest.approx(1.5)], [0.1, 1],
    ]  # fmt: skip


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_a_table_wider_than_the_page_says_how_much_is_hidden():
    sources = [files("open_mythos.report").joinpath(name).read_text() for name in ("charts.js", "page.js")]
    functions = re.search(r"^function outOfView.*?^}", sources[1], re.DOTALL | re.MULTILINE)[0]
    asked = """console.log(JSON.stringify([outOfView({ clientWidth: 800, scrollWidth: 800 }, 64),
      outOfView({ clientWidth: 400, scrollWidth: 800 }, 64)]))"""
    done = subprocess.run([NODE, "-e", sources[0] + functions + asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left_out = "Only 50.0% of the table is in view: scroll it to the right, up to 64 loops."
    assert json.loads(done.stdout) == ["", left_out]


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_a_browser_draws_every_section_and_handles_arrow_keys(page, tmp_path):
    press = """<script>
    const say = (key) => document.querySelector("#example [role=group][tabindex]").dispatchEvent(
      new KeyboardEvent("keydown", { key, bubbles: true }));
    document.title = "loop " + document.querySelector("#example input").value;
    ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"].forEach(say);
    document.title += ", then " + document.querySelector("#example output").textContent;
    </script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", press), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options = ["--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command + options, capture_output=True, text=True, timeout=120)
    drawn = done.stdout
    assert "<title>loop 1, then loop 3 of " in drawn
    assert len(re.findall(r"<section[^>]*hidden", drawn)) == 0
    assert drawn.count("<canvas") == 2 and drawn.count("<polyline") >= 8
    assert '<h1 id="title">&lt;/script&gt;&lt;script&gt;alert(1)' in drawn
