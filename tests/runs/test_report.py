"""The page is well-formed, self-contained, safe for any model output, and readable on phones and in dark mode."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from ernie_align.cli import app
from ernie_align.errors import DataError
from ernie_align.evaluation import evaluate
from ernie_align.report.page import write_page
from tests.support.runs import recipe_of, run_quietly, write_rows

_XHTML = "{http://www.w3.org/1999/xhtml}"
_EVIL = "<script>alert('no')</script> & <b>\x07"
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folders(checkpoints, digits, tmp_path_factory):
    """A run with rollouts, and an evaluation of two checkpoints with an answer that contains HTML."""
    from datasets import Dataset

    home = tmp_path_factory.mktemp("report")
    rows = [json.loads(line) for line in (digits / "val.jsonl").read_text().splitlines()][:8]
    path = write_rows(digits / "reported.jsonl", rows)
    run = home / "run"
    run_quietly(
        recipe_of("lora", checkpoints["vl_moe"], path, run, adapter={"scopes": ["vision_experts"]},
                  training={"max_steps": 2})
    )  # fmt: skip
    completion = {
        "row": "a.jsonl:1", "completion": _EVIL, "reasoning": None, "reward/exact_match": 1.0, "reward": 1.0,
        "advantage": 0.5, "side": "chosen", "left_out": None,
    }  # fmt: skip
    (run / "completions").mkdir()
    Dataset.from_list([completion]).to_parquet(run / "completions" / "step-000001.parquet")
    plan = {
        "data": [{"path": str(path)}],
        "metrics": [{"name": "exact_match"}, {"name": "perplexity"}],
        "generation": {"max_new_tokens": 2},
        "retention": {"tokens": 60, "routed_rows": 3},
        "require": ["text_retention>=1"],
    }
    evaluate([checkpoints["vl_moe"], run / "final"], config=plan, out=run / "eval")
    report = run / "eval" / "report.json"
    content = json.loads(report.read_text())
    place = content["samples"][0]
    content["shown"][place]["results"]["run"]["answers"] = [_EVIL]
    report.write_text(json.dumps(content))
    return run


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page([folders], path)
    return path


def test_the_page_is_well_formed_and_names_what_it_shows(page):
    tree = ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    assert tree.tag == f"{_XHTML}html"
    told = " ".join("".join(tree.itertext()).split())
    assert all(
        what in told for what in ("Run run", "stage: lora", "Trained parameters", "Loss", "Completions at step 1")
    )
    assert all(what in told for what in ("Evaluation eval", "Requirements", "bit-identical", "Load of each expert"))
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_nothing_is_fetched(page):
    """Images are data URLs, links stay on the page, and no style sheet, script or font is loaded."""
    tree = ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    named = {
        value
        for element in tree.iter()
        for key, value in element.attrib.items()
        if key.rpartition("}")[2] in ("src", "href", "srcset", "action", "data", "poster")
    }
    assert any(value.startswith("data:image/png;base64,") for value in named)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in named)
    assert not {f"{_XHTML}script", f"{_XHTML}link", f"{_XHTML}iframe"} & {element.tag for element in tree.iter()}
    assert not re.search(r"@import|url\((?!#)", page.read_text())


def test_an_answer_is_escaped(page):
    text = page.read_text()
    assert "<script" not in text and text.count("&lt;script&gt;alert") >= 2  # an answer and a completion
    assert "\x07" not in text and "\u2407" in text


def test_a_report_moves_with_its_folder(folders, tmp_path):
    """The folder contains thumbnails, so the page does not need the data."""
    moved = shutil.copytree(folders / "eval", tmp_path / "moved")
    write_page([moved], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<img ") == sum(
        len(row["images"]) for row in shown(json.loads((moved / "report.json").read_text()))
    )


def test_a_report_file_keeps_its_images_next_to_it(folders, checkpoints, digits, tmp_path):
    """`--out FILE.json`: thumbnails are in a folder next to the file, and its page embeds them."""
    out = tmp_path / "demo.json"
    flags = ("--data", digits / "reported.jsonl", "--limit", 2, "--max-new-tokens", 1, "--out", out)
    run = CliRunner().invoke(app, ["eval", *map(str, (checkpoints["vl_moe"], *flags))])
    assert run.exit_code == 0, run.output
    images = [image for row in json.loads(out.read_text())["shown"] for image in row["images"]]
    assert images and all(image.startswith("demo_images/") and (tmp_path / image).is_file() for image in images)
    page = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "page.html")])
    assert page.exit_code == 0 and page.output.splitlines()[-1].endswith(str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == len(images) and "Evaluation demo" in text


def test_a_report_without_baselines_still_loads(folders, tmp_path):
    """Reports of the first release compare with the first checkpoint and do not name it; images may be null."""
    old = shutil.copytree(folders / "eval", tmp_path / "old")
    content = json.loads((old / "report.json").read_text())
    for checkpoint in content["checkpoints"]:
        del checkpoint["baseline"]
    content["shown"][0]["images"] = [None]
    (old / "report.json").write_text(json.dumps(content))
    write_page([old], tmp_path / "page.html")
    assert "run is compared with vl_moe." in (tmp_path / "page.html").read_text()


def test_control_characters_do_not_reach_the_terminal(capsys):
    """Control characters become symbols and markup stays text, in lines and in tables."""
    from ernie_align.report.console import Terminal, checks_table

    terminal = Terminal()
    terminal.log("a\x1b[2Jb [bold]c[/bold]")
    terminal.console.print(checks_table([("name", "pass", "[red]\x07")]))
    told = capsys.readouterr().out
    assert "a␛[2Jb [bold]c[/bold]" in told and "[red]␇" in told and "\x1b" not in told


def shown(report):
    return [report["shown"][place] for place in [*report["samples"], *(one["row"] for one in report["changed"])]]


def test_the_command(folders, tmp_path):
    result = CliRunner().invoke(app, ["report", str(folders)])
    assert result.exit_code == 0 and (folders / "report.html").exists()
    assert CliRunner().invoke(app, ["report", str(folders), str(folders / "eval")]).exit_code == 2
    with pytest.raises(DataError, match=r"neither run\.json"):
        write_page([tmp_path], tmp_path / "page.html")
    with pytest.raises(DataError, match="no such file or folder"):
        write_page([tmp_path / "none"], tmp_path / "page.html")


@pytest.mark.skipif(
    _CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="Chromium is absent: no browser has looked at the page (apt-get install chromium; pip install playwright)",
)
def test_in_a_browser(page):
    """On a phone and on a desktop, light and dark: no error, no request, no horizontal scrolling, readable text."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                tab, told, asked = context.new_page(), [], []
                tab.on("console", lambda message, told=told: told.append(message.text))
                tab.on("pageerror", lambda error, told=told: told.append(str(error)))
                tab.on("request", lambda request, asked=asked: asked.append(request.url))
                tab.goto(Path(page).as_uri())
                assert told == [] and [url for url in asked if not url.startswith("data:")] == [Path(page).as_uri()]
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                ink, ground = tab.evaluate(
                    "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
                )
                chart = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
                assert chart == ink  # a chart's text has the page's text color in both schemes
                assert contrast(ink, ground) > 7  # WCAG 2.2, level AAA
                assert (luminance(ground) < 0.1) == (scheme == "dark")
                assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
                context.close()
        browser.close()


def luminance(color):
    """Relative luminance of `rgb(r, g, b)`, by WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
