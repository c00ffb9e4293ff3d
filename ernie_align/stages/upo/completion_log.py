"""What one sees of rollouts: figures for the log, and tables of completions kept in the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ernie_align.rewards import Reward
from ernie_align.stages.upo.groups import Group


class CompletionTables:
    """`step-<n>.parquet` under a folder: at the first step and then every `steps`, all completions of a rollout."""

    def __init__(self, folder: Path, steps: int):
        self.folder = folder
        self.steps = steps

    def wanted(self, step: int) -> bool:
        """Whether the rollout of a step (counted from 1) is kept."""
        return step == 1 or step % self.steps == 0

    def keep(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """Write one table; one that a stopped run left is replaced."""
        from datasets import Dataset

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}.parquet"
        partial = path.with_name(f".{path.name}.partial")
        Dataset.from_list(rows).to_parquet(partial)
        partial.replace(path)
        return path


def completion_table(
    groups: Sequence[Group], rewards: Sequence[str], decode: Any, row_name: Any
) -> list[dict[str, Any]]:
    """One row per completion: where its prompt stands, what was asked and answered, and what it earned."""
    rows = []
    for group in groups:
        sides = dict(zip(group.pair or (), ("chosen", "rejected"), strict=False))
        for place, completion in enumerate(group.completions):
            said = completion[-1] if isinstance(completion, list) else {"content": completion}
            scores = dict(zip(rewards, group.scores[place].tolist(), strict=True))
            rows.append(
                {
                    "row": row_name(*group.example["rows"]),
                    "domain": group.domain,
                    "prompt": group.prompt if isinstance(group.prompt, str) else json.dumps(group.prompt),
                    "completion": said["content"],
                    "reasoning": said.get("reasoning_content"),
                    "text": decode(group.ids[place]),
                    "tokens": len(group.ids[place]),
                    **{f"reward/{name}": score for name, score in scores.items()},
                    **{f"extra/{name}": values[place] for name, values in group.extra.items()},
                    "reward": group.rewards[place].item(),
                    "advantage": group.advantages[place].item(),
                    "left_out": group.left_out,
                    "side": sides.get(place),
                }
            )
    return rows


def rollout_metrics(groups: Sequence[Group], rewards: Sequence[Reward], stop_ids: Sequence[int]) -> dict[str, float]:
    """Means over the completions of all processes: rewards by function and by domain, and lengths in tokens."""
    rows = gather_object(
        [
            (group.domain, group.scores[place].tolist(), group.rewards[place].item(), len(ids), ids[-1] in stop_ids)
            for group in groups
            for place, ids in enumerate(group.ids)
        ]
    )
    domains, scores, sums, lengths, ended = zip(*rows, strict=True)
    total, table, length = torch.tensor(sums), torch.tensor(scores), torch.tensor(lengths, dtype=torch.float32)
    judged = total[~total.isnan()]
    figures = {"reward": total.nanmean().item(), "reward_std": judged.std().item() if len(judged) > 1 else 0.0}
    for number, reward in enumerate(rewards):
        figures[f"rewards/{reward.name}"] = table[:, number].nanmean().item()
        figures |= {f"rewards/{reward.name}/{what}": float(count) for what, count in reward.counts.items()}
    for domain in sorted(set(domains)):
        own = torch.tensor([other == domain for other in domains])
        figures[f"domains/{domain}"] = total[own].nanmean().item()
    return figures | {
        "completions/mean_length": length.mean().item(),
        "completions/max_length": length.max().item(),
        "completions/cut_off": 1 - sum(ended) / len(ended),
    }
