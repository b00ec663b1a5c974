"""Compares training policies after growth: peak rate, warm-up, Adam's moments; one change at a time, three seeds each.

It uses the small model and the text of the comparison shakespeare.toml. Run that first, then, from the repository:

    python tools/benchmarks/growth/policy.py runs/shakespeare/compare runs/shakespeare/policy

Rerun it to resume; several processes may share one folder. Writes policy.json there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.experiments.compare import comparison, comparison_config
from megatron_ligo.experiments.compare.run_folder import last_checkpoint

CONFIG = Path(__file__).parent / "shakespeare.toml"
GROWN, SCRATCH = "noisy_stack", "scratch"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
# Rates that the comparison did not try for scratch.
SCRATCH_RATES = (8e-3,)
# Peak rate of the runs that change the warm-up or the moments.
RATE = 2e-3
KEYS = ("seed", "budget", "steps", "begun", "loss")
CASES = {
    **{f"peak {lr:g}": (GROWN, {"compare.lrs": [lr]}) for lr in RATES},
    **{f"warm-up {part:g}": (GROWN, {"compare.lrs": [RATE], "compare.warmup": part}) for part in (0.0, 0.02, 0.3)},
    **{f"moments {kind}": (GROWN, {"compare.lrs": [RATE], "handoff.moments": kind}) for kind in ("grow", "old")},
    "moments grow, warm-up 0": (
        GROWN,
        {"compare.lrs": [RATE], "handoff.moments": "grow", "compare.warmup": 0.0},
    ),
    **{f"scratch, peak {lr:g}": (SCRATCH, {"compare.lrs": [lr]}) for lr in SCRATCH_RATES},
}


def main(compared: Path, output: Path) -> None:
    source = compared / "jobs" / "source"
    fixed = {
        "small.path": f"{last_checkpoint(source)}",
        "compare.source_steps": 0,
        "compare.source_flops": read_json(source / "result.json")["flops"],
    }
    results = {}
    for name, (arm, changes) in CASES.items():
        overrides = [f"{key}={_to_toml(value)}" for key, value in {**fixed, **changes}.items()]
        outcome = comparison.run_comparison(
            comparison_config.load_comparison(CONFIG, overrides), output / name.replace(" ", "_"), [arm], print
        )
        runs = outcome["arms"][arm]["runs"]
        results[name] = {"changes": changes, "runs": [{key: run[key] for key in KEYS} for run in runs]}
        write_json(output / "policy.json", {"config": CONFIG.name, "cases": results, "versions": outcome["versions"]})


def _to_toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value}"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
