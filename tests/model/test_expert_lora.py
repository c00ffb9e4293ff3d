"""Grouped-GEMM expert LoRA equals PEFT's in numbers, files and API, without computing W + BA."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from ernie_align.models.adapters import attach_adapter
from ernie_align.models.expert_lora import ParamWrapper, register_expert_lora
from ernie_align.models.load import load_model
from ernie_align.recipe import AdapterBlock, PartAdapter
from tests.support.runs import batch_with_images, relative_difference, tensors_of

SPARSE = ("moe", "vl_moe")
GATE_UP, DOWN = ["experts.gate_up_proj"], ["experts.down_proj"]
CASES = {
    "both weights": {"target_parameters": GATE_UP + DOWN},
    "up-projections": {"target_parameters": GATE_UP},
    "down-projections": {"target_parameters": DOWN},
    "text pool": {"target_parameters": ["text_moe.experts.gate_up_proj", "text_moe.experts.down_proj"]},
    "vision pool": {"target_parameters": ["vision_moe.experts.gate_up_proj", "vision_moe.experts.down_proj"]},
    "rsLoRA": {"target_parameters": GATE_UP + DOWN, "use_rslora": True},
    "another rank": {
        "target_parameters": GATE_UP + DOWN,
        "rank_pattern": {r".*experts\.down_proj": 12},
        "alpha_pattern": {r".*experts\.down_proj": 5},
    },
    "with attention": {"target_parameters": GATE_UP + DOWN, "target_modules": r".*self_attn\.(q|v)_proj"},
}


def config_of(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": [], "task_type": "CAUSAL_LM", **settings})


def adapted(bundle, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module.*")
        model = get_peft_model(copy.deepcopy(bundle.model), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # both factors, equal in two models, and about as large as the weights
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def ours_and_pefts(bundle, **settings) -> tuple[PeftModel, PeftModel]:
    return adapted(bundle, register_expert_lora(config_of(**settings))), adapted(bundle, config_of(**settings))


@pytest.fixture(params=SPARSE)
def bundle(request, checkpoints):
    return load_model(str(checkpoints[request.param]), dtype="float32")


@pytest.fixture
def batch(bundle, digits):
    if bundle.architecture.has_vision:
        batch = batch_with_images(bundle, digits)
        return {key: value for key, value in batch.items() if key != "vision_tokens"}
    torch.manual_seed(0)
    ids = torch.randint(5, 400, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, 14:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(these, those) -> float:
    """Return the distance of two dicts of tensors, relative to the norm of the second."""
    squares = sum((these[name].double() - those[name].double()).pow(2).sum() for name in those)
    length = sum(value.double().pow(2).sum() for value in those.values())
    # no gradient: vision tokens of the last layer, to which no token attends
    return 0.0 if squares == length == 0 else float((squares / length).sqrt())


TWO_POOLS = {case for case in CASES if case.endswith(" pool")}  # the text family has one


@pytest.mark.parametrize(
    ("bundle", "case"),
    [(family, case) for family in SPARSE for case in CASES if family == "vl_moe" or case not in TWO_POOLS],
    indirect=["bundle"],
)
def test_loss_and_gradients_are_pefts(bundle, batch, case):
    ours, pefts = ours_and_pefts(bundle, **CASES[case])
    assert any(isinstance(module, ParamWrapper) for module in ours.modules())
    assert not any(isinstance(module, ParamWrapper) for module in pefts.modules())
    (loss, gradients), (their_loss, their_gradients) = (loss_and_gradients(model, batch) for model in (ours, pefts))
    # float32 sums in another order: 1e-5 is some tens of roundings of 1e-7 through four layers
    assert torch.allclose(loss, their_loss, rtol=1e-5)
    assert gradients.keys() == their_gradients.keys() == {n for n, p in ours.named_parameters() if p.requires_grad}
    for name, theirs in their_gradients.items():
        assert distance({name: gradients[name]}, {name: theirs}) < 1e-5, name


def test_bfloat16_is_nearer_to_float32_than_peft_is(bundle):
    """Pool by pool, because in a full model a changed routing choice would hide the difference.

    The expected values are computed in float32 from the same bfloat16 weights.
    """
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    exact = copy.deepcopy(pefts)
    for model in (ours, pefts, exact):
        for name, parameter in model.named_parameters():
            rounded = parameter.data.bfloat16()
            parameter.data = rounded.float() if ".lora_" in name or model is exact else rounded
    torch.manual_seed(2)
    hidden, grad = torch.randn(2, 256, 128).bfloat16()
    weights, chosen = torch.rand(256, 8).softmax(-1).topk(2)
    weights = weights.bfloat16()

    def pools(model):
        return [module for name, module in model.named_modules() if name.endswith(".experts")]

    def results(pool, dtype):
        x = hidden.to(dtype, copy=True).requires_grad_()
        pool.zero_grad(set_to_none=True)
        output = pool(x, chosen, weights.to(dtype))
        output.backward(grad.to(dtype))
        update = output.detach().float() - pool.get_base_layer()(x, chosen, weights.to(dtype)).detach().float()
        trained = {name: parameter.grad for name, parameter in pool.named_parameters() if parameter.grad is not None}
        return {"update": update}, {"output": output.detach()}, {"input": x.grad}, trained

    for exact_pool, our_pool, their_pool in zip(*map(pools, (exact, ours, pefts)), strict=True):
        expected = results(exact_pool, torch.float32)
        our = [distance(*pair) for pair in zip(results(our_pool, torch.bfloat16), expected, strict=True)]
        their = [distance(*pair) for pair in zip(results(their_pool, torch.bfloat16), expected, strict=True)]
        assert all(mine < theirs for mine, theirs in zip(our, their, strict=True)), (our, their)


def test_files_are_pefts_and_load_either_way(bundle, batch, tmp_path):
    ours, pefts = ours_and_pefts(bundle, **CASES["another rank"])
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in pefts.named_parameters()]
    ours.save_pretrained(tmp_path / "ours")
    pefts.save_pretrained(tmp_path / "pefts")
    mine, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "pefts")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert _config(tmp_path / "ours") == _config(tmp_path / "pefts")
    again = PeftModel.from_pretrained(copy.deepcopy(bundle.model), tmp_path / "ours")
    assert torch.equal(logits(again, batch), logits(pefts, batch))


def _config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def test_merged_and_unmerged(bundle, batch):
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    base, with_adapter = logits(bundle.model, batch), logits(ours, batch)
    ours.merge_adapter()
    pefts.merge_adapter()
    assert torch.equal(logits(ours, batch), logits(pefts, batch))
    assert relative_difference(logits(ours, batch), with_adapter) <= 1e-5  # some tens of float32 roundings
    with ours.disable_adapter():  # PEFT subtracts the update again, which rounds
        assert relative_difference(logits(ours, batch), base) <= 1e-5
    assert torch.equal(logits(ours.merge_and_unload(), batch), logits(pefts.merge_and_unload(), batch))


def test_a_disabled_or_zero_adapter_changes_no_bit(bundle, batch):
    ours, _ = ours_and_pefts(bundle, **CASES["both weights"])
    base = logits(bundle.model, batch)
    with ours.disable_adapter():
        assert torch.equal(logits(ours, batch), base)
    assert not torch.equal(logits(ours, batch), base)
    for name, parameter in ours.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(logits(ours, batch), base)


def test_several_adapters_on_one_model(bundle, batch):
    """A copy under another name, switched to and back, as TRL does for a frozen reference."""
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    first = logits(ours, batch)
    for model in (ours, pefts):
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                copied = model.get_parameter(name.replace(".default.", ".ref."))
                copied.data.copy_(parameter.data)
                parameter.data.mul_(1.5)
    changed = logits(ours, batch)
    assert not torch.allclose(changed, first, atol=1e-3)
    ours.set_adapter("ref")
    assert torch.equal(logits(ours, batch), first)
    ours.set_adapter("default")
    assert torch.equal(logits(ours, batch), changed)
    for model in (ours, pefts):
        model.base_model.set_adapter(["default", "ref"])
    (loss, gradients), (their_loss, their_gradients) = (loss_and_gradients(model, batch) for model in (ours, pefts))
    assert torch.allclose(loss, their_loss, rtol=1e-5)  # as above
    assert distance(gradients, their_gradients) < 1e-5 and len(gradients) == len(their_gradients)


def test_new_continued_and_loaded_adapters_are_grouped(bundle, checkpoints, tmp_path):
    family = bundle.architecture.family
    parts = [part for part in bundle.architecture.by_part if part.endswith("_experts") and part != "shared_experts"]
    block = AdapterBlock(scopes={part: PartAdapter(rank=2 + i) for i, part in enumerate(parts)}, rank=4)
    attach_adapter(bundle, block)
    bundle.model.save_pretrained(tmp_path)
    continued = load_model(str(checkpoints[family]), dtype="float32")
    attach_adapter(continued, block.model_copy(update={"path": str(tmp_path)}))
    loaded = load_model(tmp_path, dtype="float32")
    wrapped = len(parts) * 2 * 3  # two weights in each of three sparse layers
    for model in (bundle.model, continued.model, loaded.model):
        assert sum(isinstance(module, ParamWrapper) for module in model.modules()) == wrapped


def test_checkpointing_recomputes_the_same(bundle, batch):
    ours, _ = ours_and_pefts(bundle, **CASES["with attention"])
    ours.train()
    loss, gradients = loss_and_gradients(ours, batch)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, same = loss_and_gradients(ours, batch)
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert any("experts" in name for name in gradients)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(bundle, batch, weights):
    bundle.model = bundle.model.to(weights)
    ours, pefts = ours_and_pefts(bundle, **CASES["with attention"])
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradients), (their_loss, their_gradients) = (loss_and_gradients(m, batch) for m in (ours, pefts))
    # every linear layer rounds to 8 bits, steps of 4e-3; a routing choice may change with it
    assert torch.allclose(loss, their_loss, rtol=2e-2)
    assert distance(gradients, their_gradients) < 0.2
    assert all(gradients[name].dtype == their_gradients[name].dtype for name in their_gradients)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest new tensor, without views."""

    def __init__(self, model):
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_of_the_size_of_the_experts_is_allocated(bundle, batch):
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    smallest = min(tensor.size for tensor in bundle.architecture.tensors if tensor.kind == "fused")
    largest = {}
    for name, model in (("ours", ours), ("pefts", pefts)):
        with LargestTensor(model) as mode:
            loss_and_gradients(model, batch)
        largest[name] = mode.largest
    assert largest["ours"] < smallest <= largest["pefts"]


def test_two_runs_are_equal_and_idle_experts_get_no_gradient(bundle, batch):
    ours, _ = ours_and_pefts(bundle, **CASES["both weights"])
    few = {key: value for key, value in batch.items() if key not in ("pixel_values", "image_grid_thw")}
    few = {key: value[-1:, -3:] for key, value in few.items()}  # three text tokens cannot reach eight experts twice
    _, gradients = loss_and_gradients(ours, few)
    torch.full((1 << 20,), float("nan"))  # memory that the allocator may return next
    _, again = loss_and_gradients(ours, few)
    idle = 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name])
        if ".lora_A." in name:
            idle += int((gradient.view(8, 3, -1) == 0).all(dim=(1, 2)).sum())
    assert idle > 0


def test_an_unsupported_kernel_warns_once_and_uses_peft(bundle, batch):
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    for model in (ours, pefts):
        model.get_base_model().set_experts_implementation("eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        mine = logits(ours, batch)
        logits(ours, batch)
    messages = [str(warning.message) for warning in caught if "expert LoRA" in str(warning.message)]
    assert messages == [
        "expert LoRA uses PEFT's slow path: the experts' kernel is eager, not one of grouped_mm, batched_mm"
    ]
    assert torch.equal(mine, logits(pefts, batch))


def test_generation_equals_pefts(bundle, batch):
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    prompt = {key: value[-1:] for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    replies = [model.eval().generate(**prompt, max_new_tokens=8, do_sample=False) for model in (ours, pefts)]
    assert torch.equal(*replies) and replies[0].shape[1] > prompt["input_ids"].shape[1]


def test_another_activation_uses_peft(bundle, batch):
    ours, pefts = ours_and_pefts(bundle, **CASES["both weights"])
    for model in (ours, pefts):
        for module in model.modules():
            if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"):
                module.act_fn, module.config.hidden_act = torch.nn.GELU(), "gelu"
    with pytest.warns(RuntimeWarning, match="activation is gelu"):
        mine = logits(ours, batch)
    assert torch.equal(mine, logits(pefts, batch))
