"""The pages in a real browser, without a network: what is painted, what is linked, what the controls do.

Chromium is driven by a script at the end of a copy of the page; its own log of the network is the witness.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmae.synthesis.layers import middle
from medmae.synthesis.report_cohort import write_index
from tests.synthesis.report_case import Page, study, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
SECONDS = 900  # on a busy machine; a page takes about ten

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

HELPERS = """
const panels = () => [...document.querySelectorAll(".panel")];
const set = (id, value) => { const e = $(id); e.value = value; e.dispatchEvent(new Event("input")); };
const pause = ms => new Promise(done => setTimeout(done, ms));
const settle = async () => { for (let i = 0; i < 4; i++) await pause(30); };
// What a panel shows now, as (height, width) of its green channel, half size.
const pixels = view => {
  view.nv.drawScene();
  const {width, height} = view.canvas, copy = document.createElement("canvas");
  [copy.width, copy.height] = [width >> 1, height >> 1];
  const context = copy.getContext("2d");
  context.drawImage(view.canvas, 0, 0, copy.width, copy.height);
  const {data} = context.getImageData(0, 0, copy.width, copy.height);
  const rgb = [0, 0, 0], rows = [];
  for (let i = 0; i < data.length; i += 4) for (const c of [0, 1, 2]) rgb[c] += data[i + c];
  let left = 0, right = 0;
  for (let y = 0; y < copy.height; y++) for (let x = 0; x < copy.width; x++)
    if (x < copy.width / 2) left += data[4 * (y * copy.width + x)]; else right += data[4 * (y * copy.width + x)];
  const corner = [...context.getImageData(copy.width >> 4, copy.height >> 4, 1, 1).data].slice(0, 3);
  return {rgb, left, right, corner, size: [width, height]};
};
const place = view => [...view.nv.frac2vox(view.nv.scene.crosshairPos)];
"""


def browse(page: Path, tmp_path: Path, script: str, *flags: str) -> tuple[dict[str, Any], set[str]]:
    """What ``script`` (the body of an async function) returns in the page, and every address the browser asked for."""
    copy = page.with_name(f"driven-{page.name}")
    driver = f"""<script>(async () => {{
      let result;
      try {{
        for (let i = 0; i < 4000 && !document.documentElement.dataset.ready && document.getElementById("data"); i++)
          await new Promise(done => setTimeout(done, 25));
        {HELPERS}
        await settle();
        result = await (async () => {{ {script} }})();
      }} catch (error) {{ result = {{error: String(error.stack)}}; }}
      document.documentElement.dataset.result = JSON.stringify(result);
    }})()</script></body>"""
    # The policy of the page must let the test's own script run, as it does any inline one; nothing else is changed.
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", driver), encoding="utf-8")
    log = tmp_path / "network.json"
    command = [
        *[str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu-sandbox", "--no-first-run", "--mute-audio"],
        *["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"],
        *[f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--window-size=1400,1000"],
        *["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=120000", "--dump-dom"],
        *[*flags, copy.resolve().as_uri()],
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert "error" not in result, result["error"]
    text = log.read_text(encoding="utf-8", errors="replace")
    asked = {url for url in re.findall(r'"url":"([^"]+)"', text) if not url.startswith(("data:", "chrome:", "about:"))}
    return result, asked


def outside(asked: set[str]) -> set[str]:
    """The addresses that are not files; what the browser itself asks for at its start is no work of the page."""
    own = ("accounts.google.com", "update.googleapis.com", "clients2.google.com", "optimizationguide-pa.googleapis.com")
    return {url for url in asked if not url.startswith("file:") and not any(name in url for name in own)}


def test_the_network_log_would_show_a_request(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<html><body><img src="http://elsewhere.invalid/x.png"></body></html>')
    _, asked = browse(page, tmp_path, "await new Promise(done => setTimeout(done, 500)); return {};")
    assert any("elsewhere.invalid" in url for url in outside(asked))


def test_the_viewer_starts_paints_and_links_its_panels_without_a_network(tmp_path: Path) -> None:
    volumes = study(right=250.0)
    write(tmp_path / "case.html", volumes, warnings=["unlike the training cohort"])
    script = """
      const ready = document.documentElement.dataset.ready, why = $("why").textContent;
      if (ready !== "viewer") return {ready, why};
      const titles = panels().map(panel => panel.querySelector("h3 span").textContent);
      const start = views.map(place);
      set("slice-2", data.at[2] + 6); set("slice-0", data.at[0] - 5); await settle();
      const moved = views.map(place), values = views.map(view => view.value.textContent), where = [...at];
      const key = (name, shiftKey) => views[1].canvas.dispatchEvent(
        new KeyboardEvent("keydown", {key: name, shiftKey, bubbles: true, cancelable: true}));
      key("ArrowLeft"); key("PageUp"); key("ArrowUp"); key("ArrowUp", true); await settle();
      const keyed = views.map(place);
      // The mouse, through niivue's own listeners: a click into the second panel.
      $("cross").click(); set("layout", "axial"); await settle();
      const painted = views.map(pixels);
      const box = views[1].canvas.getBoundingClientRect();
      for (const type of ["mousedown", "mouseup"]) views[1].canvas.dispatchEvent(new MouseEvent(type, {
        bubbles: true, button: 0, clientX: box.left + box.width * 0.4, clientY: box.top + box.height * 0.4}));
      await settle();
      const clicked = views.map(place);
      return {ready, titles, start, moved, values, where, keyed, painted, clicked,
              network: performance.getEntriesByType("resource").map(entry => entry.name),
              stamps: panels().map(p => getComputedStyle(p.querySelector(".stamp")).display !== "none"),
              stills: getComputedStyle($("stills")).display, mark: document.querySelector(".mark").textContent};
    """
    seen, asked = browse(tmp_path / "case.html", tmp_path, script, *WEBGL)
    assert seen["ready"] == "viewer", seen["why"]
    assert outside(asked) == set() and seen["network"] == []
    assert seen["titles"] == ["T1", "T2", "FLAIR synthetic", "FLAIR truth"]
    assert seen["stamps"] == [False, False, True, False] and seen["stills"] == "none"
    assert "SYNTHETIC \u2013 NOT ACQUIRED" in seen["mark"]

    start = np.array(seen["start"])
    assert (start == start[0]).all()
    page = Page(tmp_path / "case.html")
    codes = {
        title: np.rint((image.get_fdata() - e["low"]) / ((e["high"] - e["low"]) / 254)) + 1
        for title in seen["titles"]
        for e, image in [page.image(title)]
    }
    assert tuple(start[0]) == middle(codes["T1"])
    assert (np.array(seen["moved"]) == start[0] + [-5, 0, 6]).all()
    assert (np.array(seen["keyed"]) == start[0] + [-4, 11, 7]).all()  # to the patient's right, up, 1 + 10 to the front
    # What a panel says of the place is what nibabel finds there.
    for title, told in zip(seen["titles"], seen["values"], strict=True):
        entry, image = page.image(title)
        assert float(told.split()[0]) == pytest.approx(float(image.get_fdata()[tuple(seen["where"])]), abs=0.5)
        assert told.endswith(entry["unit"])
    clicked = np.array(seen["clicked"])
    assert (clicked == clicked[0]).all() and (clicked[0] != np.array(seen["keyed"])[0]).any()
    for panel in seen["painted"]:
        assert sum(panel["rgb"]) > 0.02 * 255 * 3 * panel["size"][0] * panel["size"][1] / 4
    # T1 is brighter on the patient's right, which is on the left of the picture; T2 is not.
    t1, t2 = seen["painted"][:2]
    assert t1["left"] > 1.15 * t1["right"] and 0.9 < t2["left"] / t2["right"] < 1.1


def test_truth_takes_the_place_of_the_synthesis_and_loses_its_mark(tmp_path: Path) -> None:
    write(tmp_path / "case.html", study())
    script = """
      if (document.documentElement.dataset.ready !== "viewer") return {why: $("why").textContent};
      const box = panels()[2], heading = () => box.querySelector("h3 span").textContent;
      const tell = () => [heading(), box.classList.contains("synthetic"), views[2].canvas.getAttribute("aria-label")];
      const before = [tell(), pixels(views[2])];
      document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "t", bubbles: true}));
      await settle(); await settle();
      const swapped = [tell(), pixels(views[2])], truth = pixels(views[3]);
      $("swap").click(); await settle(); await settle();
      const back = [tell(), pixels(views[2])];
      document.querySelector("input[value=difference]").click(); await settle(); await settle();
      const over = pixels(views[2]), key = [$("key-low").textContent, $("key-high").textContent, $("key").hidden];
      document.querySelector("input[value=none]").click(); await settle(); await settle();
      const black = views[2].ends[0], t1 = pixels(views[0]);
      black.value = black.max * 0.8; black.dispatchEvent(new Event("input")); await settle();
      const darker = [pixels(views[2]), pixels(views[3]), pixels(views[0])];
      $("reset").click(); await settle();
      const reset = pixels(views[2]);
      const check = [...$("shown").querySelectorAll("input")][0];
      check.click(); await settle(); const fewer = panels().filter(box => !box.hidden).length;
      check.click(); await settle(); await settle(); await settle();
      return {before, swapped, truth, back, over, key, t1, darker, reset, fewer, more: views.length,
              first: panels()[0].querySelector("h3 span").textContent};
    """
    seen, _ = browse(tmp_path / "case.html", tmp_path, script, *WEBGL)
    assert "why" not in seen, seen["why"]
    assert seen["before"][0][:2] == ["FLAIR synthetic", True] and "NOT ACQUIRED" in seen["before"][0][2]
    assert seen["swapped"][0][:2] == ["FLAIR truth", False] and "NOT ACQUIRED" not in seen["swapped"][0][2]
    assert np.allclose(seen["swapped"][1]["rgb"], seen["truth"]["rgb"], rtol=0.01)
    assert not np.allclose(seen["swapped"][1]["rgb"], seen["before"][1]["rgb"], rtol=0.01)
    assert seen["back"] == seen["before"]
    red, _, blue = seen["over"]["rgb"]
    grey = seen["before"][1]["rgb"]
    assert abs(red - grey[0]) + abs(blue - grey[2]) > 0.02 * sum(grey)
    assert max(seen["over"]["corner"]) < 30  # nothing is laid over the background
    assert seen["key"] == ["-1.50 sd", "1.50 sd", False]
    dark, linked, other = seen["darker"]
    assert dark["rgb"][0] < 0.9 * grey[0] and linked["rgb"][0] < 0.9 * seen["truth"]["rgb"][0]
    assert other["rgb"] == seen["t1"]["rgb"]  # another group keeps its black and white
    assert seen["reset"]["rgb"] == grey
    assert (seen["fewer"], seen["more"], seen["first"]) == (3, 4, "T1")


def test_without_webgl_the_still_pictures_are_there(tmp_path: Path) -> None:
    write(tmp_path / "case.html")
    script = """return {ready: document.documentElement.dataset.ready, why: $("why").textContent,
      stills: getComputedStyle($("stills")).display, viewer: getComputedStyle($("viewer")).display,
      wide: [...document.querySelectorAll("#stills img")].map(image => image.naturalWidth)};"""
    seen, asked = browse(tmp_path / "case.html", tmp_path, script, "--disable-3d-apis")
    assert seen["ready"] == "stills" and "no WebGL 2" in seen["why"]
    assert (seen["stills"], seen["viewer"]) == ("block", "none")
    assert len(seen["wide"]) == 5 and min(seen["wide"]) > 300
    assert outside(asked) == set()


def test_cohort_table_sorts_filters_and_sums_up(tmp_path: Path) -> None:
    psnr = {
        name: write(tmp_path / f"{name}.html", study(right=right), name=name).scores["flair"].psnr
        for name, right in (("a", 300.0), ("b", 0.0), ("c", 100.0))
    }
    index = write_index(tmp_path)
    assert index is not None
    script = """
      const rows = () => [...document.querySelectorAll("#rows tbody tr")].filter(row => !row.hidden);
      const names = () => rows().map(row => row.cells[0].textContent);
      const head = [...document.querySelectorAll("th button")].find(b => b.textContent.startsWith("PSNR"));
      const plain = names(); head.click(); const up = names(); head.click(); const down = names();
      const sorted = head.parentElement.getAttribute("aria-sort");
      const mean = document.querySelector("tfoot td.number").textContent;
      document.getElementById("find").value = "B"; document.getElementById("find").dispatchEvent(new Event("input"));
      return {plain, up, down, sorted, mean, found: names(), count: document.getElementById("count").textContent};
    """
    seen, asked = browse(index, tmp_path, script.replace("$(", "document.getElementById("))
    order = sorted(psnr, key=lambda name: psnr[name])
    assert (seen["plain"], seen["up"], seen["down"]) == (["a", "b", "c"], order, order[::-1])
    assert seen["sorted"] == "descending" and seen["found"] == ["b"] and seen["count"] == "1 of 3 rows"
    values = np.array(list(psnr.values()))
    assert seen["mean"] == f"{values.mean():.2f} \u00b1 {values.std():.2f}"
    assert outside(asked) == set()
