"""Token dispatch is bit-equal to transformers' block, however the model is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ernie_align.models.load import load_model
from ernie_align.models.routing import install_routing
from ernie_align.models.token_dispatch import (
    ExpertIndices,
    IndexedMoeBlock,
    compute_expert_indices,
    install_token_dispatch,
)
from tests.support.runs import batch_with_images


@pytest.fixture
def bundle(checkpoints):
    return load_model(str(checkpoints["vl_moe"]), dtype="float32")


@pytest.fixture
def stock(checkpoints):
    """transformers' model with our routing hook only."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(checkpoints["vl_moe"], dtype=torch.float32)
    install_routing(model.model)
    return model


@pytest.fixture
def batch(bundle, digits):
    batch = batch_with_images(bundle, digits)
    return {key: value for key, value in batch.items() if key != "vision_tokens"}


def run(model, batch, **more):
    model.zero_grad(set_to_none=True)
    output = model(**batch, **more, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def assert_equal(these, those):
    (output, gradients), (expected, expected_gradients) = these, those
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    # correction biases of the stock model require gradients by an oversight of transformers, and get none
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_equal_bit_for_bit(bundle, stock, batch, checkpointing):
    assert not batch["attention_mask"].all()
    for model in (bundle.model, stock):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    these, those = run(bundle.model, batch), run(stock, batch)
    assert_equal(these, those)
    assert any("vision_moe" in name for name in these[1])


def test_text_never_enters_the_vision_pool(bundle, stock, batch):
    text = {key: batch[key][2:] for key in ("input_ids", "attention_mask", "labels")}
    assert_equal(run(bundle.model, text), run(stock, text))


def test_router_logits_equal_the_stock_ones(bundle, stock, batch):
    ours, theirs = (model(**batch, output_router_logits=True).router_logits for model in (bundle.model, stock))
    assert len(ours) == len(theirs) == 3 and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_generation_with_images(bundle, stock, batch):
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    ours, theirs = (m.eval().generate(**prompt, max_new_tokens=6, do_sample=False) for m in (bundle.model, stock))
    assert torch.equal(ours, theirs)


def test_two_forwards_before_one_backward(bundle, stock, batch):
    """Recomputed layers use the indices of their own batch, not of the last one."""
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    tokens = bundle.modality.ids
    is_text = torch.tensor([[int(token) not in tokens for token in row] for row in other["input_ids"]])
    first_text = is_text.int().argmax(dim=1)
    other["input_ids"][0, first_text[0]] = bundle.modality.image_start
    gradients = []
    for model in (bundle.model, stock):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**batch, use_cache=False).loss + 2 * model(**other, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_a_block_accepts_token_types(bundle, stock):
    """For direct calls of a layer, and for batches of vision tokens only."""
    ours, theirs = (model.model.language_model.layers[1].mlp for model in (bundle.model, stock))
    assert isinstance(ours, IndexedMoeBlock) and type(theirs) is IndexedMoeBlock.__base__
    hidden = torch.randn(2, 5, 128)
    for types in (None, torch.zeros(2, 5), torch.ones(2, 5), torch.tensor([[0, 1, 2, 0, 0], [1, 0, 0, 0, 2]])):
        for mine, expected in zip(ours(hidden, types), theirs(hidden, types), strict=True):
            assert torch.equal(mine, expected)


def test_expert_indices():
    indices = ExpertIndices.from_token_types(torch.tensor([[0, 1, 0], [2, 0, 0]]))
    assert indices.text.tolist() == [0, 2, 4, 5] and indices.vision.tolist() == [1, 3]
    assert torch.cat([indices.text, indices.vision])[indices.inverse].tolist() == [0, 1, 2, 3, 4, 5]
    assert ExpertIndices.from_token_types(torch.zeros(2, 3)) is None and ExpertIndices.from_token_types(None) is None


class Synchronizations(TorchDispatchMode):
    """Counts the operations that search a mask: each one synchronizes with a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function in (aten.index.Tensor, aten.index_put_.default):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += function in (aten.nonzero.default, aten.any.default)
        return function(*args, **(kwargs or {}))


def test_indices_are_computed_once_per_batch(bundle, stock, batch):
    counts = []
    for model in (bundle.model, stock):
        hidden = torch.randn(*batch["input_ids"].shape, 128)
        types = torch.zeros_like(batch["input_ids"])
        types[:, 2:5] = 1
        with torch.no_grad(), Synchronizations() as synchronizations:
            model.model.language_model(inputs_embeds=hidden, moe_mm_token_type_ids=types, use_cache=False)
        counts.append(synchronizations.count)
    # the stock block, in each of three sparse layers: one search, and a mask to read and to write for each pool, twice
    assert counts == [2, 3 * (1 + 2 * 3)]


def test_copies_and_names(bundle, stock, batch):
    assert list(bundle.model.state_dict()) == list(stock.state_dict())
    install_token_dispatch(bundle.model.model.language_model)
    hooks = bundle.model.model.language_model._forward_pre_hooks
    assert list(hooks.values()).count(compute_expert_indices) == 1
    twin = copy.deepcopy(bundle.model)
    assert_equal(run(twin, batch), run(stock, batch))
