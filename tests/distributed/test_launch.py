"""Profiles are Accelerate's, and the processes are what was asked for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from ernie_align.checkpoints import integrity_error
from ernie_align.errors import AlignError, RecipeError, RunError
from ernie_align.models.architecture import Architecture
from ernie_align.models.distributed.layout import SHARDING_UNITS, ParallelLayout
from ernie_align.runs.distributed import configure_launch
from ernie_align.runs.launch import PROFILES, launch, launch_command, profile_path, profiles
from ernie_align.runs.run_dir import RunDirectory
from tests.support.multi_process import FSDP2
from tests.support.runs import FAMILIES, ROOT, recipe_of


@pytest.mark.parametrize("name", profiles())
def test_a_profile_is_a_config_of_accelerate_and_says_whether_it_was_run(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"  # what a user writes
    assert path.samefile(profile_path(name))
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Run by the tests" in head or "Not run on" in head


def test_what_is_tested_over_gloo_is_what_the_fsdp2_profile_asks_for():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    wanted = ["--config_file", str(profile_path("fsdp2")), "-m", "ernie_align"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(wanted))
    environment = prepare_multi_gpu_env(args)
    assert {name: environment.get(name) for name in FSDP2} == FSDP2
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment  # the run says it, family by family


def test_the_launcher_is_called_with_the_users_words():
    arguments = ["lora", "recipe.yaml", "training.max_steps=3", "--resume"]
    command = launch_command("fsdp2", 8, arguments)
    assert command[0] == sys.executable and command[-len(arguments) :] == arguments
    assert command[1:8] == [
        *("-m", "accelerate.commands.launch", "--config_file", str(PROFILES / "fsdp2.yaml")),
        *("--num_processes", "8", "-m"),
    ]
    assert "--num_processes" not in launch_command(str(PROFILES / "ddp.yaml"), None, arguments)
    nodes = launch_command("ddp_nodes", 4, arguments, ["--machine_rank", "1"])
    assert nodes[6:10] == ["4", "--machine_rank", "1", "-m"]


def test_a_process_finds_the_folder_that_the_first_one_holds(tmp_path):
    """On a disk that is not shared it is not there, or was left by another run."""
    first, elsewhere = RunDirectory(tmp_path / "shared"), RunDirectory(tmp_path / "own")
    first.begin("", resume=False)
    assert RunDirectory(tmp_path / "shared").is_held_by(first.holder())
    assert not elsewhere.is_held_by(first.holder(), patience=0)
    elsewhere.path.mkdir()
    (elsewhere.path / "run.lock").write_text("process 1 on another")
    assert not elsewhere.is_held_by(first.holder(), patience=0)
    first.release()


def test_an_unknown_profile():
    with pytest.raises(RecipeError, match=r"did you mean fsdp2.*choose from cpu, ddp"):
        profile_path("fspd2")
    with pytest.raises(RecipeError, match=r"no profile '\.\./profiles/ddp'"):
        profile_path("../profiles/ddp")


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_classes_of_the_family(checkpoints, family):
    from ernie_align.models.load import load_model

    names = {type(module).__name__ for module in load_model(str(checkpoints[family])).model.modules()}
    assert {name for names_ in SHARDING_UNITS[family] for name in names_} <= names


def test_fsdp_that_would_be_ddp_is_refused(checkpoints, monkeypatch):
    from accelerate import PartialState

    architecture = Architecture.from_config(json.loads((checkpoints["vl_moe"] / "config.json").read_text()))

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match="FSDP was asked for, and Accelerate makes NO of it on cpu"):
        configure_launch(PartialState(), architecture, stage="sft", adapters=False, where="model.name")


@pytest.mark.parametrize(
    ("family", "processes", "sizes", "stage", "adapters", "said"),
    [
        ("vl_moe", 2, {"ep_size": 4}, "lora", True, "2 processes cannot be dealt out, 1 to a matrix and 4 to a pool"),
        ("vl_moe", 6, {"tp_size": 2, "ep_size": 3}, "sft", False, "in whole groups of --tp-size"),
        ("vl_moe", 2, {"tp_size": 2}, "sft", False, "deal the experts out as well: --ep-size 2"),
        ("vl_moe", 2, {"tp_size": 2, "ep_size": 2}, "lora", True, "adapters on matrices that are cut"),
        ("vl_moe", 2, {"tp_size": 2, "ep_size": 2}, "dpo", False, "stage dpo on matrices that are cut"),
        ("vl_moe", 16, {"ep_size": 16}, "sft", False, "8 experts of a pool cannot be dealt out to 16 processes"),
        ("dense", 2, {"ep_size": 2}, "sft", False, "the model has no routed experts"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(checkpoints, family, processes, sizes, stage, adapters, said):
    architecture = Architecture.from_config(json.loads((checkpoints[family] / "config.json").read_text()))
    with pytest.raises(AlignError, match=said):
        ParallelLayout(**sizes).validate(architecture, processes, stage=stage, adapters=adapters, where="model.name")


def test_weights_are_shared_out_once(checkpoints, monkeypatch):
    from accelerate import PartialState

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    architecture = Architecture.from_config(json.loads((checkpoints["vl_moe"] / "config.json").read_text()))
    with pytest.raises(RunError, match=r"FSDP was asked for beside it[\s\S]*launch with ep"):
        configure_launch(
            PartialState(),
            architecture,
            stage="lora",
            adapters=True,
            where="",
            parallel=ParallelLayout(ep_size=1, tp_size=1),
        )


@pytest.mark.parametrize(
    ("profile", "processes", "launcher"), [("cpu", 2, "--max_restarts 3"), ("cpu", 2, ""), ("one_gpu", 1, "")]
)
def test_a_launched_run_stops_and_says_so_as_any_other(checkpoints, text_rows, tmp_path, profile, processes, launcher):
    """At SIGTERM: every process saves and ends with 75, none outlives the launch, and that is its exit code."""
    recipe = recipe_of("lora", checkpoints["dense"], text_rows, tmp_path / "run", training={"max_steps": 100_000})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    words = ["lora", str(tmp_path / "recipe.json"), "--launch", profile, "--processes", str(processes)]
    words += ["--launcher", launcher] if launcher else []  # it would start anew what ends with another code than 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen([sys.executable, "-m", "ernie_align", *words], cwd=ROOT, stdout=log, stderr=log)
        while not metrics.exists() and started.poll() is None:
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        code = started.wait(60)
    said = (tmp_path / "log").read_text()
    assert code == 75, said
    assert said.count("stopped by SIGTERM after step") == processes
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert integrity_error(checkpoint, hashes=True) is None
    directory = RunDirectory(tmp_path / "run")
    assert directory.begin(
        (tmp_path / "run" / "recipe.resolved.yaml").read_text(), resume=True, examples_a_step=4 * processes
    )
    directory.release()


def test_a_launched_run_that_fails_says_why_in_its_exit_code(checkpoints, text_rows, tmp_path):
    """3 of the run itself, where the launcher says 1."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    recipe = recipe_of("lora", checkpoints["dense"], text_rows, tmp_path / "run")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert launch("one_gpu", None, ["lora", str(tmp_path / "recipe.json")]) == 3


def test_slurm_script_is_sound_shell():
    subprocess.run(["bash", "-n", str(ROOT / "recipes" / "cluster" / "slurm.sh")], check=True)


@pytest.mark.parametrize(("beforehand", "found"), [("", True), ("the reference is a second model", False)])
def test_the_first_process_reads_alone_unless_all_are_asked_beforehand(checkpoints, monkeypatch, beforehand, found):
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from ernie_align.runs.distributed import rank0_loading_enabled

    assert not rank0_loading_enabled()
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "as it is given")
    architecture = Architecture.from_config(json.loads((checkpoints["vl_moe"] / "config.json").read_text()))
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    configure_launch(state, architecture, stage="dpo", adapters=False, where="", beforehand=beforehand)
    assert rank0_loading_enabled() is found
