"""The completion log: tables of completions in the run directory, and the metrics of a rollout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ernie_align.checkpoints import atomic_path
from ernie_align.rewards import Reward
from ernie_align.stages.upo.groups import Group


@dataclass
class CompletionLog:
    """Writes all completions of a rollout to `step-<n>.parquet` in `folder`: at the first step, then every `steps`."""

    folder: Path
    steps: int

    def is_due(self, step: int) -> bool:
        """Return True if the rollout of this step (counted from 1) is logged."""
        return step == 1 or step % self.steps == 0

    def write(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """Write the table of a step, over a table that an interrupted run left."""
        from datasets import Dataset

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}.parquet"
        with atomic_path(path) as partial:
            Dataset.from_list(rows).to_parquet(partial)
        return path


def completion_table(
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    decode: Callable[[list[int]], str],
    row_name: Callable[[int, int], str],
) -> list[dict[str, Any]]:
    """Return one row per completion: the row of its prompt, prompt, completion, scores, reward and advantage."""
    rows = []
    for group in groups:
        sides = dict(zip(group.pair or (), ("chosen", "rejected"), strict=False))
        name = row_name(*group.example["rows"])
        prompt = group.prompt if isinstance(group.prompt, str) else json.dumps(group.prompt)
        for index, completion in enumerate(group.completions):
            answer = completion[-1] if isinstance(completion, list) else {"content": completion}
            scores = zip(rewards, group.scores[index].tolist(), strict=True)
            rows.append(
                {
                    "row": name,
                    "domain": group.domain,
                    "prompt": prompt,
                    "completion": answer["content"],
                    "reasoning": answer.get("reasoning_content"),
                    "text": decode(group.completion_ids[index]),
                    "tokens": len(group.completion_ids[index]),
                    **{f"reward/{reward.name}": score for reward, score in scores},
                    **{f"extra/{column}": values[index] for column, values in group.extra.items()},
                    "reward": group.rewards[index].item(),
                    "advantage": group.advantages[index].item(),
                    "left_out": group.filter_reason,
                    "side": sides.get(index),
                }
            )
    return rows


def rollout_metrics(groups: Sequence[Group], rewards: Sequence[Reward], stop_ids: Sequence[int]) -> dict[str, float]:
    """Return means over the completions of all ranks: rewards by function and by domain, lengths in tokens."""
    rows = gather_object(
        [
            (group.domain, scores, reward, len(ids), ids[-1] in stop_ids)
            for group in groups
            for scores, reward, ids in zip(
                group.scores.tolist(), group.rewards.tolist(), group.completion_ids, strict=True
            )
        ]
    )
    domains, scores, sums, lengths, ended = zip(*rows, strict=True)
    total, table, length = torch.tensor(sums), torch.tensor(scores), torch.tensor(lengths, dtype=torch.float32)
    scored = total[~total.isnan()]
    metrics = {"reward": total.nanmean().item(), "reward_std": scored.std().item() if len(scored) > 1 else 0.0}
    for number, reward in enumerate(rewards):
        metrics[f"rewards/{reward.name}"] = table[:, number].nanmean().item()
        metrics |= {f"rewards/{reward.name}/{event}": float(count) for event, count in reward.counts.items()}
    for domain in sorted(set(domains)):
        in_domain = torch.tensor([other == domain for other in domains])
        metrics[f"domains/{domain}"] = total[in_domain].nanmean().item()
    return metrics | {
        "completions/mean_length": length.mean().item(),
        "completions/max_length": length.max().item(),
        "completions/cut_off": 1 - sum(ended) / len(ended),
    }
