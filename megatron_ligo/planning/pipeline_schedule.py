"""Simulates DeepSpeed's pipeline schedule: one forward, one backward (1F1B)."""

from __future__ import annotations

from collections.abc import Sequence


def schedule_1f1b(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Returns the passes of a stage in order, each as ("F" or "B", micro-batch)."""
    warm_up = min(stages - stage - 1, micro_batches)
    passes = [("F", m) for m in range(warm_up)]
    for m in range(micro_batches - warm_up):
        passes += [("F", warm_up + m), ("B", m)]
    return passes + [("B", m) for m in range(micro_batches - warm_up, micro_batches)]


def simulate_step(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, sending: float = 0.0
) -> float:
    """Returns the seconds of a step.

    forward, backward: seconds per micro-batch, by stage. sending: seconds of a transfer between neighbouring stages.
    """
    stages = len(forward)
    seconds = {"F": forward, "B": backward}
    queues = [schedule_1f1b(stage, stages, micro_batches) for stage in range(stages)]
    stage_free_at = [0.0] * stages
    ended_at: dict[tuple[str, int, int], float] = {}
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                kind, m = queue[0]
                needs = (kind, m, stage - 1 if kind == "F" else stage + 1)
                if kind == "B" and stage == stages - 1:
                    needs = ("F", m, stage)
                is_first = kind == "F" and stage == 0
                if not is_first and needs not in ended_at:
                    break
                ready = 0.0 if is_first else ended_at[needs] + (0.0 if needs[2] == stage else sending)
                stage_free_at[stage] = max(stage_free_at[stage], ready) + seconds[kind][stage]
                ended_at[kind, m, stage] = stage_free_at[stage]
                queue.pop(0)
    return max(stage_free_at)


def compute_bubble(forward: Sequence[float], backward: Sequence[float], micro_batches: int, seconds: float) -> float:
    """Returns the idle fraction of the busiest stage in a step of `seconds`."""
    busy = max(f + b for f, b in zip(forward, backward, strict=True)) * micro_batches
    return max(0.0, 1.0 - busy / seconds)
