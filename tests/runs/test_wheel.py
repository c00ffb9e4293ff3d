"""A wheel contains everything that the package reads, and its command line works without a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.runs import ROOT

LAUNCH_PROFILES = "ernie_align/shipped_recipes/accelerate/"  # a link to ernie_align/runs/profiles


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """An unpacked wheel of a copy of the sources: setuptools writes next to those that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("ernie_align", "recipes"):
        shutil.copytree(ROOT / name, folder / "src" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", folder, folder / "src"], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ernie_align", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_every_file_of_the_package_is_in_the_wheel(unpacked):
    expected = set()
    for folder, _, names in os.walk(ROOT / "ernie_align", followlinks=True):
        for name in names:
            path = str((Path(folder) / name).relative_to(ROOT))
            if "__pycache__" not in path and not path.startswith(LAUNCH_PROFILES) and not path.endswith("slurm.sh"):
                expected.add(path)
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in found if ".dist-info/" not in path} == expected


def test_the_shipped_recipes_are_listed_and_copied_without_a_checkout(unpacked, tmp_path):
    listed = run(unpacked, tmp_path, "recipes")
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines() if "/" in line.split("  ")[0]]
    assert names == sorted(
        str(path.relative_to(ROOT / "recipes").with_suffix(""))
        for path in (ROOT / "recipes").glob("*/*.yaml")
        if path.parent.name != "accelerate"
    )
    copied = run(unpacked, tmp_path, "recipes", "copy", "lora/vl_28b", "my.yaml")
    assert copied.returncode == 0, copied.stderr
    first, *lines = (tmp_path / "my.yaml").read_text().splitlines()
    schema = tmp_path / first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(schema.read_text())["title"] == "ernie-align recipe"
    assert "#   ernie-align lora my.yaml" in lines
    planned = run(unpacked, tmp_path, "plan", "my.yaml", "--json")
    assert planned.returncode == 0 and "memory" in json.loads(planned.stdout), planned.stderr


def test_copying_overwrites_nothing(unpacked, tmp_path):
    (tmp_path / "mine.yaml").write_text("stage: mine\n")
    refused = run(unpacked, tmp_path, "recipes", "copy", "lora/vl_28b", "mine.yaml")
    assert refused.returncode == 2 and "mine.yaml: the file exists already" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    (tmp_path / "schema.json").write_text("{}")
    refused = run(unpacked, tmp_path, "recipes", "copy", "lora/vl_28b", "new.yaml")
    assert refused.returncode == 2 and "schema.json: the file exists already" in refused.stderr
    assert (tmp_path / "schema.json").read_text() == "{}" and not (tmp_path / "new.yaml").exists()
    misspelled = run(unpacked, tmp_path, "recipes", "copy", "lora/vl_28", "new.yaml")
    assert misspelled.returncode == 2 and "did you mean lora/vl_28b?" in misspelled.stderr


def test_a_copied_evaluation_config_needs_no_schema(unpacked, tmp_path):
    copied = run(unpacked, tmp_path, "recipes", "copy", "recipes/eval/digits.yaml", "folder/eval.yaml")
    assert copied.returncode == 0, copied.stderr
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["eval.yaml"]
    assert YAML(typ="safe").load(tmp_path / "folder" / "eval.yaml")["metrics"]
