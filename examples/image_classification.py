"""An image classifier, deterministic and Bayesian: which is better, where it starts, and what rotated images show.

    python -m examples.image_classification                                # LeNet5, scikit-learn's digits, --task acc
    python -m examples.image_classification --task init                    # a pretrained net converted, then trained on
    python -m examples.image_classification --task uncert --data_dir MNIST # rotated images; MNIST's IDX files
    python -m examples.image_classification --model resnet20 --dataset_name uoft-cs/cifar10

Every flag: ``--help``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from bayeformers.reports import save_figure, write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.held_out import FRESH, history_of
from examples.images.classifier_arguments import Arguments, parse_arguments
from examples.images.classifier_training import fit_deterministic, save
from examples.images.comparison import compare
from examples.images.data import load_images
from examples.images.models import load_model, model_size
from examples.images.setting import DETERMINISTIC, Outcome, Setting
from examples.images.start import start
from examples.images.turned import check_position, turn
from examples.running import Clock, say

TASKS: dict[str, Callable[[Setting], Outcome]] = {"acc": compare, "init": start, "uncert": turn}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one task; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    clock = Clock()
    name_or_path = model_args.model_name_or_path
    with user_input():
        past = history_of("model_name_or_path", [name_or_path], must_know=True) if name_or_path else FRESH
        data = load_images(data_args, args.seed, model_size(model_args.model, name_or_path), history=past)
        if model_args.task == "uncert":
            check_position(model_args.strip_image, data)
        model = load_model(model_args.model, name_or_path, model_args.width, data)
    clock.lap("loading")
    say(f"Deterministic: {type(model).__name__}, {len(data.train):,} training images of {data.name}")
    trained = fit_deterministic(model, args, data, is_trained=name_or_path is not None)
    if name_or_path is None:
        save(trained, data, Path(args.output_dir or ".") / DETERMINISTIC)
    clock.lap("deterministic_training")
    setting = Setting(model_args, args, data, trained, clock)
    outcome = TASKS[model_args.task](setting)
    results = {**_facts(arguments, setting), **setting.facts, **outcome.results, "arguments": _arguments(arguments)}
    if args.process_index == 0:
        report(setting.folder, outcome, results)
    return results


def _facts(arguments: Arguments, setting: Setting) -> dict[str, Any]:
    model_args, _, args = arguments
    data = setting.data
    return {
        "task": model_args.task,
        "model": model_args.model_name_or_path or model_args.model,
        "images": {"name": data.name, **{part: len(getattr(data, part)) for part in ("train", "validation", "test")}},
        "seed": args.seed,
        "processes": args.world_size,
        "parameters": sum(parameter.numel() for parameter in setting.trained.model.parameters()),
        "seconds": setting.clock.seconds,
    }


def _arguments(arguments: Arguments) -> dict[str, Any]:
    model_args, data_args, args = arguments
    return {**asdict(model_args), **asdict(data_args), "training": args.to_sanitized_dict()}


def report(folder: Path, outcome: Outcome, results: dict[str, Any]) -> None:
    """Print the tables and write the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{results['task']}.json", folder / f"{results['task']}.png"]
    write_json(files[0], results)
    save_figure(outcome.figure, files[1])
    print(f"\n{outcome.text}\n")
    if results.get("beware"):
        print(f"Laplace: {'; '.join(results['beware'])}.\n  Its aleatoric and epistemic parts mean nothing.\n")
    print("seconds: " + "  ".join(f"{name} {value}" for name, value in results["seconds"].items()))
    print(f"Written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    run_command(main)
