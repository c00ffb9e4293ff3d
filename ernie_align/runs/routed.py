"""How many vision tokens a few steps of a run had, and how many reached the vision experts of each layer."""

from __future__ import annotations

from typing import Any, Literal

from transformers import TrainerCallback

from ernie_align.models.modality import ModalityTokens, moe_mm_token_type_ids
from ernie_align.models.routing import pool_blocks


class RoutedCounter(TrainerCallback):
    """Counts at the backbone's door, by input_ids, and at the door of each pool of vision experts.

    Only while a forward lasts: with gradient checkpointing the pools are entered again on the way back.
    """

    def __init__(self) -> None:
        self.has_pools = False
        self.forwards = self.tokens = 0
        self.reached: dict[str, int] = {}
        self._inside = False
        self._handles: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        blocks = {name: block for name, block in pool_blocks(model).items() if name.endswith("vision_moe")}
        self.has_pools = bool(blocks)
        if not blocks:
            return
        modality = ModalityTokens.from_config(model.config)
        backbone = model.get_submodule(next(iter(blocks)).partition(".language_model.")[0])

        def enter(module: Any, given: tuple, named: dict[str, Any]) -> None:
            ids = named.get("input_ids", given[0] if given else None)
            self._inside = ids is not None
            if self._inside:
                self.forwards += 1
                self.tokens += int(moe_mm_token_type_ids(ids, modality).sum())

        def leave(*_: Any) -> None:
            self._inside = False

        def reach(name: str):
            def count(block: Any, given: tuple) -> None:
                if self._inside:
                    self.reached[name] += given[0].numel() // block.hidden_dim

            return count

        self._handles.append(backbone.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(backbone.register_forward_hook(leave))
        for name, block in blocks.items():
            self.reached[name] = 0
            self._handles.append(block.register_forward_pre_hook(reach(name)))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        while self._handles:
            self._handles.pop().remove()

    def verdict(self) -> tuple[Literal["pass", "fail", "not applicable"], str]:
        """What was found, and in words."""
        if not self.has_pools:
            return "not applicable", "a model with one pool of experts, or none"
        if not self.tokens:
            return "not applicable", "no image in the rows of these steps"
        for name, count in self.reached.items():
            if count != self.tokens:
                return "fail", f"{self.tokens} vision tokens, of which {count} reached {name}"
        what = f"{self.tokens} vision tokens in {self.forwards} forwards, all of which reached the vision experts"
        return "pass", f"{what} of each of {len(self.reached)} layers"
