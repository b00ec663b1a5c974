"""The pipeline's schedule, simulated: one forward, one backward (1F1B), as DeepSpeed's engine runs it."""

from __future__ import annotations

from collections.abc import Sequence


def schedule_1f1b(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """What a stage does in turn: ("F" or "B", micro-batch)."""
    ahead = min(stages - stage - 1, micro_batches)
    done = [("F", m) for m in range(ahead)]
    for m in range(micro_batches - ahead):
        done += [("F", ahead + m), ("B", m)]
    return done + [("B", m) for m in range(micro_batches - ahead, micro_batches)]


def simulate_step(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, sending: float = 0.0
) -> float:
    """Seconds of a step: forward and backward seconds of a micro-batch by stage, `sending` from stage to stage."""
    stages = len(forward)
    seconds = {"F": forward, "B": backward}
    queues = [schedule_1f1b(stage, stages, micro_batches) for stage in range(stages)]
    free = [0.0] * stages
    ended: dict[tuple[str, int, int], float] = {}
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                kind, m = queue[0]
                needs = (kind, m, stage - 1 if kind == "F" else stage + 1)
                if kind == "B" and stage == stages - 1:
                    needs = ("F", m, stage)
                first = kind == "F" and stage == 0
                if not first and needs not in ended:
                    break
                ready = 0.0 if first else ended[needs] + (0.0 if needs[2] == stage else sending)
                free[stage] = ended[kind, m, stage] = max(free[stage], ready) + seconds[kind][stage]
                queue.pop(0)
    return max(free)


def compute_bubble(forward: Sequence[float], backward: Sequence[float], micro_batches: int, seconds: float) -> float:
    """The part of a step of so many seconds in which the busiest stage waits (0: none)."""
    busy = max(f + b for f, b in zip(forward, backward, strict=True)) * micro_batches
    return max(0.0, 1.0 - busy / seconds)
