"""A note on a run's routers, from the last step that recorded them."""

from __future__ import annotations

from collections.abc import Sequence

KEYS = ("router_entropy", "expert_load_min", "expert_load_max", "dropped_tokens")


def describe_routing(metrics: Sequence[dict]) -> tuple[str, ...]:
    """Returns one note, or none for a run without experts."""
    rows = [row for row in metrics if all(row.get(key) is not None for key in KEYS)]
    if not rows:
        return ()
    step, (entropy, smallest, largest, _) = rows[-1]["step"], (rows[-1][key] for key in KEYS)
    dropped = sum(row["dropped_tokens"] for row in rows)
    return (
        f"its routers at step {step}: entropy {entropy:.3f} of that of equal scores, loads from {smallest:.2f} to "
        f"{largest:.2f} of an equal share over experts and layers; {dropped:.0f} tokens dropped in the run",
    )
