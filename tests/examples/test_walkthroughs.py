"""Every walkthrough, executed from a clean kernel in a folder that holds nothing but recipes and the walkthroughs.

`make test-examples` runs them: minutes of training, so `make test` does not. They run in order and leave their runs to
the next one, as they do for a reader; each also makes what it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.notebooks import unexpected_stderr
from tests.support.runs import ROOT

pytestmark = pytest.mark.examples
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
SLOWEST = 1800  # seconds of one cell, on a machine that others use too


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The top of a checkout in which nothing has been made yet. The kernel finds this package, installed or not."""
    top = tmp_path_factory.mktemp("clone")
    for name in ("examples", "recipes"):
        (top / name).mkdir()
        for path in (ROOT / name).rglob("*"):
            if path.is_file():
                (top / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                (top / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return top


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_a_clean_kernel(clone, name):
    """No error, and nothing on stderr that a reader would stumble on."""
    notebook = nbformat.read(clone / "examples" / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(clone / "examples")}}
    NotebookClient(notebook, timeout=SLOWEST, kernel_name="python3", resources=resources).execute()
    said = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not unexpected_stderr(said)
    assert any("image/png" in output.get("data", {}) for output in said)


def test_the_script_evaluates_and_exports(clone):
    """After the notebooks, as they are sorted: the adapter passes, and one merged folder is there."""
    command = [sys.executable, "examples/501_evaluate_and_export.py"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=SLOWEST)
    assert done.returncode == 0, done.stderr
    assert "MISSED" not in done.stdout
    assert (clone / "runs/examples/merged/model.safetensors").exists()
    assert (clone / "runs/examples/comparison/report.html").stat().st_size > 10_000
