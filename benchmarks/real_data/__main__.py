"""The command line of the benchmark: finetune, predict, table."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.real_data as package

from .context import Context, run
from .data import FOLDERS
from .finetune import finetune
from .methods import METHODS
from .table import report


def main() -> None:
    """Parse the command line and run one step."""
    args = _parser().parse_args()
    if args.step == "finetune":
        finetune(args.model, args.task, args.seed, args.data_dir, args.output_dir / f"{args.task}-{args.seed}")
    elif args.step == "predict":
        context = Context(args.task, args.seed, args.data_dir, args.output_dir, args.model)
        for name in args.methods:
            skips = args.reported_only and name != "map"  # whose held-out rows the temperature is fitted on
            print(run(context, name, METHODS[name], reported_only=skips), flush=True)
    else:
        seeds = [int(seed) for seed in args.seeds]
        options = {"held_out": args.held_out, "num_resamples": args.num_resamples, "name": args.name}
        report(args.output_dir, args.tasks, seeds, list(args.methods), **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    finetuning = steps.add_parser("finetune", help="train a checkpoint")
    predicting = steps.add_parser("predict", help="run methods on a checkpoint")
    tabulating = steps.add_parser("table", help="compare what was predicted")
    for step in (finetuning, predicting, tabulating):
        step.add_argument("--output_dir", type=Path, required=True, help="holds a folder per task and seed")
    for step in (finetuning, predicting):
        step.add_argument("--data_dir", type=Path, required=True, help="folder that holds CoLA, MRPC, SST-2")
        step.add_argument("--task", choices=sorted(FOLDERS), required=True)
        step.add_argument("--seed", type=int, default=0)
    finetuning.add_argument("--model", required=True, help="folder or hub name of a pretrained encoder")
    for step in (predicting, tabulating):
        step.add_argument("--methods", type=_methods, default=list(METHODS), help=f"of {','.join(METHODS)}")
    predicting.add_argument("--model", help="the pretrained encoder, for laplace_pretrained_mean")
    predicting.add_argument("--reported_only", action="store_true", help="no predictions of the held-out rows")
    tabulating.add_argument("--tasks", type=lambda text: text.split(","), default=sorted(FOLDERS))
    tabulating.add_argument("--seeds", type=lambda text: text.split(","), default=["0", "1", "2"])
    tabulating.add_argument("--held_out", action="store_true", help="the held-out rows alone, to choose by")
    tabulating.add_argument("--num_resamples", type=int, default=1000)
    tabulating.add_argument("--name", default="table", help="of the two files, .md and .json, in the output folder")
    return parser


def _methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no method {unknown}; there are {list(METHODS)}")
    return names


if __name__ == "__main__":
    main()
