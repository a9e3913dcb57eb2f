"""The experiment of `bandit_world`, run and reported: DPO against RPO.

python -m benchmarks.experiments.bandit --output_dir outputs/bandit
"""

from __future__ import annotations

import argparse

from benchmarks.experiments.bandit_report import report
from benchmarks.experiments.bandit_world import STEPS, sweep, train
from trainer.errors import InputError
from trainer.paths import open_folder


def main() -> None:
    """Run the sweep, test the claim, write results and figures."""
    parser = argparse.ArgumentParser(description="DPO against RPO where the true reward is known.")
    parser.add_argument("--output_dir", default="outputs/bandit", help="[outputs/bandit]")
    parser.add_argument("--seeds", type=int, default=30, help="the first third choose eta [30]")
    parser.add_argument("--first_seed", type=int, default=2000, help="they are consecutive [2000]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"Adam steps [{STEPS}]")
    args = parser.parse_args()
    if args.seeds < 6:
        parser.error(f"--seeds: expected at least 6, two to choose eta by, got {args.seeds}")
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    try:
        folder = open_folder(args.output_dir)
    except InputError as error:
        parser.error(str(error))
    settings = sweep()
    print(report(settings, seeds, train(settings, seeds, args.steps), folder))


if __name__ == "__main__":
    main()
