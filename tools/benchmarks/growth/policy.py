"""How to go on after growth: the peak rate, its warm-up and Adam's moments, one changed at a time, three seeds each.

After the comparison of shakespeare.toml, whose small model and text it takes, from the repository's folder:

    python tools/benchmarks/growth/policy.py runs/shakespeare/compare runs/shakespeare/policy

Started again it goes on; several may work on one folder. Writes policy.json there.
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
# Beyond those that the comparison has tried for scratch.
SCRATCH_RATES = (8e-3,)
# Of the runs with another warm-up, moments or start.
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
    given = {
        "small.path": f"{last_checkpoint(source)}",
        "compare.source_steps": 0,
        "compare.source_flops": read_json(source / "result.json")["flops"],
    }
    found = {}
    for name, (arm, changes) in CASES.items():
        sets = [f"{key}={_told(value)}" for key, value in {**given, **changes}.items()]
        result = comparison.run_comparison(
            comparison_config.load_comparison(CONFIG, sets), output / name.replace(" ", "_"), [arm], print
        )
        runs = result["arms"][arm]["runs"]
        found[name] = {"changes": changes, "runs": [{key: one[key] for key in KEYS} for one in runs]}
        write_json(output / "policy.json", {"config": CONFIG.name, "cases": found, "versions": result["versions"]})


def _told(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value}"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
