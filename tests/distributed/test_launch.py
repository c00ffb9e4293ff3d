"""Profiles are Accelerate configs, and a run checks that it was launched as requested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ernie_align.checkpoints import integrity_error
from ernie_align.errors import AlignError, RecipeError, RunError
from ernie_align.models.architecture import Architecture
from ernie_align.models.distributed.layout import SHARDING_UNITS, ParallelLayout
from ernie_align.runs import load_recipe, set_up
from ernie_align.runs.distributed import check_world, configure_deepspeed, configure_launch, rank0_loading_enabled
from ernie_align.runs.launch import PROFILES, launch, launch_command, profile_path, profiles
from ernie_align.runs.run_dir import RunDirectory
from tests.support.multi_process import FSDP2
from tests.support.runs import FAMILIES, ROOT, preference, recipe_of, write_rows


@pytest.mark.parametrize("name", profiles())
def test_a_profile_is_an_accelerate_config_and_says_if_it_was_run(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"  # what a user writes
    assert path.samefile(profile_path(name))
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Run by the tests" in head or "Not run on" in head


def test_the_settings_tested_over_gloo_are_those_of_the_fsdp2_profile():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    wanted = ["--config_file", str(profile_path("fsdp2")), "-m", "ernie_align"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(wanted))
    environment = prepare_multi_gpu_env(args)
    assert {name: environment.get(name) for name in FSDP2} == FSDP2
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment  # set by the run, for each family


def test_the_launcher_gets_the_users_arguments():
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


def test_a_rank_recognizes_the_folder_that_rank_0_has_locked(tmp_path):
    """On a disk that is not shared, the folder is missing, or was left by another run."""
    first, other = RunDirectory(tmp_path / "shared"), RunDirectory(tmp_path / "own")
    first.acquire("", resume=False)
    assert RunDirectory(tmp_path / "shared").is_held_by(first.holder())
    assert not other.is_held_by(first.holder(), timeout=0)
    other.path.mkdir()
    (other.path / "run.lock").write_text("process 1 on another")
    assert not other.is_held_by(first.holder(), timeout=0)
    first.release()


def test_an_unknown_profile():
    with pytest.raises(RecipeError, match=r"choose from cpu, ddp.*\n.*did you mean fsdp2"):
        profile_path("fspd2")
    with pytest.raises(RecipeError, match=r"unknown profile '\.\./profiles/ddp'"):
        profile_path("../profiles/ddp")


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_classes_of_the_family(checkpoints, family):
    from ernie_align.models.load import load_model

    names = {type(module).__name__ for module in load_model(str(checkpoints[family])).model.modules()}
    assert {name for names_ in SHARDING_UNITS[family] for name in names_} <= names


@pytest.fixture
def setup_for(checkpoints, text_rows, tmp_path):
    """(stage, family) -> the setup of a recipe; adapters for lora, else all parts are trained."""

    def make(stage, family="vl_moe"):
        rows = text_rows
        if stage == "dpo":
            rows = write_rows(tmp_path / "pairs.jsonl", [preference("one?", "one", "two")])
        recipe = recipe_of(stage, checkpoints[family], rows, tmp_path / "run")
        if stage != "lora":
            recipe = {**recipe, "tune": {"scopes": "all"}}
            recipe.pop("adapter", None)
        return set_up(load_recipe(recipe))

    return make


def state_of(kind, processes=1):
    """Accelerate's state, as far as launch checks read it."""
    kind = SimpleNamespace(value=kind)
    return SimpleNamespace(distributed_type=kind, num_processes=processes, device=SimpleNamespace(type="cpu"))


def test_fsdp_that_would_be_ddp_is_rejected(setup_for, monkeypatch):
    from accelerate import PartialState

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match="requested FSDP, but Accelerate falls back to NO on cpu") as caught:
        configure_launch(PartialState(), setup_for("sft"))
    assert "launch with profile ddp, cpu or one_gpu" in str(caught.value)


def test_another_number_of_ranks_than_requested_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), num_processes=1)
    with pytest.raises(RunError, match=r"launcher: requested NO on 8 processes, got NO on 1"):
        check_world(accelerator, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"launcher: requested FSDP on 8 processes, got NO on 1"):
        check_world(accelerator, None)


@pytest.mark.parametrize(
    ("family", "processes", "sizes", "adapters", "message"),
    [
        ("vl_moe", 2, {"ep_size": 4}, True, "--ep-size 4 does not divide 2 processes"),
        ("vl_moe", 6, {"tp_size": 2, "ep_size": 3}, False, "--ep-size 3 is not a multiple of --tp-size 2"),
        ("vl_moe", 2, {"tp_size": 2}, False, "experts cannot be checkpointed with --tp-size alone"),
        ("vl_moe", 2, {"tp_size": 2, "ep_size": 2}, True, "adapters are not supported with tensor parallelism"),
        ("vl_moe", 16, {"ep_size": 16}, False, "--ep-size 16 does not divide the 8 experts of a pool"),
        ("dense", 2, {"ep_size": 2}, False, "the model has no routed experts"),
    ],
)
def test_layouts_that_do_not_fit_are_rejected(checkpoints, family, processes, sizes, adapters, message):
    architecture = Architecture.from_config(json.loads((checkpoints[family] / "config.json").read_text()))
    with pytest.raises(AlignError, match=message):
        ParallelLayout(**sizes).validate(architecture, processes, adapters=adapters, where="model.name")


def test_tensor_parallelism_is_for_sft(setup_for):
    with pytest.raises(RunError, match=r"--tp-size: stage dpo does not support tensor parallelism[\s\S]*stage sft"):
        configure_launch(state_of("MULTI_GPU", 2), setup_for("dpo"), ParallelLayout(tp_size=2, ep_size=2))


def test_weights_are_sharded_once(setup_for, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"the launcher also requests FSDP[\s\S]*launch with profile ep"):
        configure_launch(state_of("FSDP", 2), setup_for("lora"), ParallelLayout(ep_size=2))


@pytest.mark.parametrize(
    ("stage", "checkpointing", "message"),
    [
        ("dpo", False, "ZeRO-3 does not support stage dpo for a model with vision"),
        ("sft", True, "ZeRO-3 does not support gradient_checkpointing for a model with vision"),
    ],
)
def test_zero3_rejects_what_would_hang(setup_for, stage, checkpointing, message):
    config = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3), gradient_checkpointing=checkpointing)
    with pytest.raises(RunError, match=message) as caught:
        configure_deepspeed(config, setup_for(stage))
    assert ("gradient_checkpointing: false" in str(caught.value)) is (stage == "sft")


@pytest.mark.parametrize(
    ("profile", "processes", "launcher"), [("cpu", 2, "--max_restarts 3"), ("cpu", 2, ""), ("one_gpu", 1, "")]
)
def test_a_launched_run_stops_with_the_exit_code_of_any_other(
    checkpoints, text_rows, tmp_path, profile, processes, launcher
):
    """After SIGTERM, every rank saves and exits with 75, none outlives the launch, and that is its exit code."""
    recipe = recipe_of("lora", checkpoints["dense"], text_rows, tmp_path / "run", training={"max_steps": 100_000})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    arguments = ["lora", str(tmp_path / "recipe.json"), "--launch", profile, "--processes", str(processes)]
    arguments += ["--launcher", launcher] if launcher else []  # restarts processes that end with another code than 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen([sys.executable, "-m", "ernie_align", *arguments], cwd=ROOT, stdout=log, stderr=log)
        while not metrics.exists() and started.poll() is None:
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        code = started.wait(60)
    output = (tmp_path / "log").read_text()
    assert code == 75, output
    assert output.count("stopped by SIGTERM after step") == processes
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert integrity_error(checkpoint, hashes=True) is None
    resolved = (tmp_path / "run" / "recipe.resolved.yaml").read_text()
    with RunDirectory(tmp_path / "run") as run_dir:
        assert run_dir.acquire(resolved, resume=True, examples_per_step=4 * processes)


def test_a_launched_run_that_fails_keeps_its_exit_code(checkpoints, text_rows, tmp_path):
    """2 for a wrong recipe, where Accelerate's launcher exits with 1."""
    recipe = recipe_of("lora", checkpoints["dense"], text_rows, tmp_path / "run", adapter={"rank": -1})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert launch("one_gpu", None, ["lora", str(tmp_path / "recipe.json")]) == 2


def test_the_slurm_script_is_valid_shell():
    subprocess.run(["bash", "-n", str(ROOT / "recipes" / "cluster" / "slurm.sh")], check=True)


@pytest.mark.parametrize(("stage", "on_rank0"), [("sft", True), ("dpo", False)])  # the reference is a second model
def test_rank_0_loads_alone_unless_all_ranks_need_the_whole_model(setup_for, monkeypatch, stage, on_rank0):
    assert not rank0_loading_enabled()
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "the user's choice")
    configure_launch(state_of("FSDP", 2), setup_for(stage))
    assert rank0_loading_enabled() is on_rank0
    assert os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "the user's choice"
