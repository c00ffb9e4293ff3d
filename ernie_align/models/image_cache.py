"""Image feature cache: encode each image of a batch once, for every row and every model that uses it.

transformers accepts image features in place of pixels (`mm_encoder_outputs`). A hook on the backbone computes them
within its forward, so that autocast, gathered shards and recomputation apply as in any layer. `generate` encodes images
before that forward: there the hooks are on tower and resampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ernie_align.models.distributed.dummy_vision import is_frozen, is_sharded


def find_backbone(model: nn.Module) -> nn.Module:
    """Return the module that computes hidden states from ids and pixels, in a model or a PeftModel."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def is_vision_frozen(model: nn.Module) -> bool:
    """Return True if nothing in tower and resampler is trained or adapted, so that image features never change.

    True for a text model.
    """
    backbone = find_backbone(model)
    parts = [getattr(backbone, name) for name in ("vision_tower", "resampler_model") if hasattr(backbone, name)]
    return is_frozen(*parts)


class ImageFeatureCache:
    """The image features of one batch. Create one per batch, so that no feature outlives its step.

    frozen: is_vision_frozen(trained model). If True, the first model that uses these pixels computes features without
    gradient and the next one, which must have the same tower, reuses them; otherwise, and with sharded weights, each
    forward computes its own. (Without gradient, because input embeddings that require gradients for checkpointing would
    cause a backward pass and a second forward through a frozen tower.) An image that occurs several times, as with
    several completions of one prompt, is encoded once.
    """

    def __init__(self, *, frozen: bool):
        self.frozen = frozen
        self._cached: tuple[Tensor, Tensor, tuple[Tensor, ...]] | None = None  # pixels, their grid, their features

    @contextmanager
    def use(self, model: nn.Module, *, times: int = 1) -> Iterator[None]:
        """Within the context, serve the images of a forward of `model` from this cache.

        times: the rows contain all images of pixel_values and image_grid_thw in order, this many times over.
        """

        def encode(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if kwargs.get("pixel_values") is None:
                return None
            grid = kwargs["image_grid_thw"]
            if kwargs.get("inputs_embeds") is None:  # before images, as on every rank: shards are gathered in one order
                kwargs["inputs_embeds"] = backbone.get_input_embeddings()(kwargs["input_ids"])
            features = self._encode(backbone, kwargs.pop("pixel_values"), grid)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features * times)}
            kwargs["image_grid_thw"] = grid.repeat(times, 1)
            return args, kwargs

        with find_backbone(model).register_forward_pre_hook(encode, with_kwargs=True):
            yield

    def _encode(self, backbone: nn.Module, pixel_values: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        """Return the features of each image, (tokens, H)."""
        if self._cached is not None and _same(self._cached[0], pixel_values) and _same(self._cached[1], grid):
            return self._cached[2]
        pixels, sizes, order = _distinct(pixel_values, grid)
        with torch.no_grad() if self.frozen else nullcontext():
            distinct = backbone.get_image_features(pixels, sizes, return_dict=True).pooler_output
        features = tuple(distinct[index] for index in order)
        # with sharded weights all ranks must run the tower, so none may skip it
        if self.frozen and not is_sharded(backbone.vision_tower, backbone.resampler_model):
            self._cached = pixel_values, grid, features
        return features


@contextmanager
def deduplicate_images(model: nn.Module) -> Iterator[None]:
    """Within the context, encode equal images once in each call that encodes images.

    The caller still gets the features of every image, so it works within `generate`. Does nothing for a text model.
    """
    backbone = find_backbone(model)
    if not hasattr(backbone, "vision_tower"):
        yield
        return
    tower, resampler = backbone.vision_tower, backbone.resampler_model
    current: list[tuple[Tensor, list[int]]] = []  # sizes of the distinct images of the current call, and their order

    def pass_distinct(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, sizes, order = _distinct(*args)
        current[:] = [(sizes, order)]
        return pixels, sizes

    def pass_distinct_sizes(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], current[0][0]

    def return_all(_: nn.Module, args: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
        sizes, order = current.pop()
        distinct = features.split((sizes.prod(dim=-1) // tower.spatial_merge_size**2).tolist())
        return torch.cat([distinct[index] for index in order])

    with (
        tower.register_forward_pre_hook(pass_distinct),
        resampler.register_forward_pre_hook(pass_distinct_sizes),
        resampler.register_forward_hook(return_all),
    ):
        yield


def _same(cached: Tensor, current: Tensor) -> bool:
    return cached is current or torch.equal(cached, current)


def _distinct(pixels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return pixels (patches, C·P²) and grid (n, 3) without repeated images, and the index of each of the n in them."""
    images = pixels.split(grid.prod(dim=-1).tolist())
    first = _first_equal(images, grid)
    distinct = sorted(set(first))
    if len(distinct) < len(images):
        pixels = torch.cat([images[index] for index in distinct])
    return pixels, grid[distinct], [distinct.index(index) for index in first]


def _first_equal(images: Sequence[Tensor], grid: Tensor) -> list[int]:
    """Return for each image (patches, C·P²) the index of the first one with equal pixels, which may be itself."""
    if len(images) < 2:
        return [0] * len(images)
    sums = torch.stack(
        [image.sum() for image in images]
    ).tolist()  # one device synchronization; equal images have equal sums
    candidates: dict[tuple, list[int]] = {}
    first = []
    for index, (image, size, total) in enumerate(zip(images, grid.tolist(), sums, strict=True)):
        others = candidates.setdefault((*size, total), [])
        first.append(next((other for other in others if torch.equal(images[other], image)), index))
        if first[-1] == index:
            others.append(index)
    return first
