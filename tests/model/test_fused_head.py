"""The head sees the positions that predict a label, and no other, and says of them what TRL's head says."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models.image_cache import find_backbone
from ernie_align.models.load import load_model
from ernie_align.stages.fused_head import fused_head_forward
from tests.support.runs import batch_with_images

FIELDS = ("log_probs", "entropy", "is_top1")


class HeadRows(TorchDispatchMode):
    """How many rows are multiplied with the whole vocabulary, product by product."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.seen: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and args[1].shape[1] == self.vocabulary:
            self.seen.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def asked(checkpoints, digits):
    """A model with TRL's head, a batch with images, and labels, of which the first row has none."""
    bundle = load_model(checkpoints["vl_moe"], dtype="float32")
    add_fused_lm_head(bundle.model, outputs=FIELDS)
    inputs = batch_with_images(bundle, digits)
    del inputs["vision_tokens"]
    labels = inputs.pop("labels")
    labels[0] = IGNORE_INDEX
    return bundle.model, inputs, labels


def test_outputs_and_gradients_are_those_of_trls_head(asked):
    model, inputs, labels = asked
    found = {}
    for name, forward in (("trl", model), ("ours", fused_head_forward(model, find_backbone(model)))):
        model.zero_grad()
        outputs = forward(**inputs, labels=labels, fused_lm_head=True)
        outputs.log_probs.sum().backward()
        found[name] = outputs, {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    (theirs, their_grads), (ours, our_grads) = found.values()
    assert torch.equal(theirs.label_mask, ours.label_mask)
    # another number of rows in one product is another order of its sums, in float32
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=0)
    assert their_grads.keys() == our_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 0])
def test_only_labelled_positions_reach_the_vocabulary(asked, rows):
    """rows: that have labels."""
    model, inputs, labels = asked
    labels[: len(labels) - rows] = IGNORE_INDEX
    with HeadRows(model.config.get_text_config().vocab_size) as head:
        outputs = fused_head_forward(model, find_backbone(model))(**inputs, labels=labels, fused_lm_head=True)
    wanted = int((labels[:, 1:] != IGNORE_INDEX).sum())
    assert head.seen == ([wanted] if wanted else [])
    outputs.log_probs.sum().backward()  # with no label, too: a batch that teaches nothing is no reason to stop
    assert next(model.parameters()).grad is not None


def test_a_call_without_labels_is_the_models_own(asked):
    model, inputs, _ = asked
    with torch.no_grad():
        ours = fused_head_forward(model, find_backbone(model))(**inputs).logits
        assert torch.equal(ours, model(**inputs).logits)
