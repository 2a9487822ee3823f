r"""A language model that says when it does not know: LoRA, a posterior of the adapter, and answers that may be refused.

    python -m examples.lora_chat                              # a tiny decoder and generated questions: minutes of CPU
    python -m examples.lora_chat --eval_only outputs/lora_chat --chat                  # answers what is typed
    python -m examples.lora_chat --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --train_file train.jsonl --validation_file dev.jsonl --test_file test.jsonl
    python -m examples.lora_chat --export_draws 8             # adapters for a server too

Lines of the files: {"question": "...", "answers": ["...", "..."]}, all of the answers right. The adapter is trained
without noise, becomes Bayesian, and is trained by the ELBO. Then both models answer questions of which half cannot be
known, and each score of doubt is asked which answers are wrong. Every flag: ``--help``.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer, experiments, export_draws, from_pretrained, generate, reports, to_bayesian
from bayeformers.experiments import flag, user_input
from bayeformers.reports import ScoredAnswer
from bayeformers.reports.writing import write_results
from examples.data import people
from examples.data.people import Question
from examples.data.tiny_decoder import make_decoder, make_tokenizer

GENERATED: dict[str, Any] = {
    "learning_rate": 3e-3, "num_train_epochs": 20, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100,
    "bayesian_epochs": 8, "bayesian_learning_rate": 1e-3, "freeze": False, "delta": 0.4, "kl_weight": 0.003,
    "prior": '{"type": "normal", "std": 0.1, "centre": 0.0}', "rho_learning_rate": 0.03, "max_new_tokens": 10,
}  # fmt: skip
"""Defaults of the generated questions: noise, prior and its weight are those of examples.bert_glue's embedded task."""
OTHER: dict[str, Any] = {
    "learning_rate": 2e-4, "num_train_epochs": 3, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16,
    "bayesian_epochs": 1, "freeze": True, "delta": 0.1, "max_new_tokens": 32,
}  # fmt: skip
"""Defaults of other models: the adapter stays as it was trained, and the ELBO finds the scales around it."""
PROMPT = "Question: {}\nAnswer:"
PLAIN, BAYESIAN = "plain LoRA", "Bayesian LoRA"
EPISTEMIC = f"{BAYESIAN}: epistemic"
ADAPTERS = ["lora_A", "lora_B"]  # both, for both have been trained: of a fresh adapter A alone is the default
ENTROPIES = ("token entropy", "epistemic")
REFUSED = "I do not know."
TABLES = {
    "groups": "test questions",
    "scores": "which answers are wrong?",
    "gains": "AUROC of epistemic uncertainty, less that of",
    "without_many": "without questions of many answers",
}


# --- Arguments -------------------------------------------------------------------------------------------------------
@dataclass
class ChatArguments(experiments.ConversionArguments):
    """Which model and questions, how it becomes Bayesian, and when it refuses."""

    model_name_or_path: str | None = flag(None, "Decoder: a folder or a hub name. Left out, a tiny one is made.")
    train_file: str | None = flag(None, "Questions as JSON lines; left out, they are generated.")
    validation_file: str | None = flag(None, "Questions that choose the threshold, as JSON lines.")
    test_file: str | None = flag(None, "Questions of the results, as JSON lines.")
    max_test_samples: int | None = flag(None, "Use the first so many questions of the test set.")
    num_people: int = flag(40, "People of the generated training set.")
    base_epochs: float = flag(10.0, "Epochs in which the tiny decoder learns the language of the questions.")
    lora_rank: int = flag(8, "Rank of the adapter of every linear layer.")
    max_new_tokens: int = flag(32, "Longest answer.")
    target_accuracy: float = flag(
        0.9, "Accuracy of the answers that are given, by which validation sets the threshold."
    )
    train_only: bool = flag(False, "Train and save a fresh Bayesian adapter, and stop: for models in pieces.")
    eval_only: str | None = flag(None, "Train nothing: answer by the adapter in this folder, an earlier --output_dir.")
    ask: list[str] = flag([], "Questions to answer when everything is trained.")
    chat: bool = flag(False, "Answer questions from the terminal, one a line, until an empty one.")
    export_draws: int = flag(0, "Write so many draws as LoRA folders for a server.")

    def __post_init__(self) -> None:
        super().__post_init__()
        experiments.check_least(self, num_people=2, base_epochs=0, lora_rank=1, max_new_tokens=1, max_test_samples=4)
        if not 0 < self.target_accuracy < 1:
            raise ValueError(f"`target_accuracy` must lie between 0 and 1, got {self.target_accuracy}.")
        files = [self.train_file, self.validation_file, self.test_file]
        if any(files) and not (all(files) and self.model_name_or_path):
            raise ValueError(
                "`train_file`, `validation_file`, `test_file` and `model_name_or_path` belong together: got "
                f"{files} and {self.model_name_or_path!r}."
            )


@dataclass
class ChatTrainingArguments(experiments.ExperimentArguments):
    """Every TrainingArguments flag, for all trainings; draws of answers are ``num_eval_samples``."""

    output_dir: str | None = flag("outputs/lora_chat", "Where the adapter, the answers and the results go.")
    save_strategy: str = flag("no", "When to save a checkpoint: no, steps or epoch.")
    warmup_steps: float = flag(0.1, "Steps of the warm-up, or their share if below 1.")
    num_eval_samples: int = flag(8, "Number S of draws, and of sampled answers of the plain model.")
    bayesian_epochs: float = flag(8.0, "Epochs of the ELBO's training.")
    bayesian_learning_rate: float = flag(1e-4, "Learning rate of the means in it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        experiments.check_least(self, num_eval_samples=2, bayesian_epochs=0)  # fewer draws cannot disagree


Arguments = tuple[ChatArguments, ChatTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line; what it does not say is the default of the generated questions, or of another model."""
    named = any(vars(experiments.look_ahead(argv, "model_name_or_path")).values())
    kinds = {"tiny decoder": GENERATED, "other models": OTHER}
    parser = experiments.ExperimentParser((ChatArguments, ChatTrainingArguments), kinds, list(kinds)[named])
    how, args = parser.parse(argv)
    return how, args


# --- Questions and models --------------------------------------------------------------------------------------------
def load_questions(how: ChatArguments, seed: int) -> dict[str, list[Question]]:
    """By split: generated, or of the files."""
    if how.train_file is None:
        splits = people.generate(seed, people=how.num_people)
    else:
        files = {"train": how.train_file, "validation": how.validation_file, "test": how.test_file}
        splits = {name: people.read(str(path)) for name, path in files.items()}
    return {**splits, "test": splits["test"][: how.max_test_samples]}


def encode(questions: Sequence[Question], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows for the Trainer; the answer and its end are what is learned."""
    rows = []
    for question in questions:
        prompt = tokenizer(PROMPT.format(question.question))["input_ids"]
        answer = tokenizer(f" {question.told}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = prompt + answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer})
    return rows


def train(
    model: nn.Module, questions: Sequence[Question], tokenizer: Any, args: Any, **changes: Any
) -> BayesianTrainer:
    """Ordinary training of a plain model, the ELBO of a Bayesian one."""
    args = copy.deepcopy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    trainer = BayesianTrainer(
        model=model, args=args, train_dataset=encode(questions, tokenizer), processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    if args.num_train_epochs > 0:
        trainer.train()
    return trainer


def load_base(how: ChatArguments, data: dict[str, list[Question]], args: Any, folder: Path) -> tuple[Any, Any]:
    """The decoder and its tokenizer: a pretrained one, or a tiny one that learns the language from other people."""
    if how.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(how.model_name_or_path, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(how.model_name_or_path), tokenizer
    rows = [row for questions in data.values() for row in questions]
    tokenizer = make_tokenizer(text for row in rows for text in (PROMPT.format(row.question), *row.answers))
    base = make_decoder(len(tokenizer))
    train(base, data["earlier"], tokenizer, args, num_train_epochs=how.base_epochs)
    if PartialState().is_main_process:
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    PartialState().wait_for_everyone()
    return AutoModelForCausalLM.from_pretrained(folder / "base"), tokenizer


# --- Answers ---------------------------------------------------------------------------------------------------------
def same(one: str, other: str) -> bool:
    """Whether two answers are the same words, whatever their case and blanks."""
    return one.casefold().split() == other.casefold().split()


@dataclass
class Answers:
    """A model's answers to N questions, greedy by the mean over its draws, and scores of doubt, (N,) each."""

    answers: list[ScoredAnswer]
    wrong: NDArray[np.bool_]
    scores: dict[str, NDArray[np.float64]]


def ask(name: str, model: nn.Module, questions: Sequence[Question], tokenizer: Any, arguments: Arguments) -> Answers:
    """Answer questions by the mean of S draws; and S times more, by each draw or by sampling of the plain model."""
    how, args = arguments
    several: dict[str, Any] = {"num_samples": args.num_eval_samples}
    if name == PLAIN:
        several = {"num_samples": 1, "do_sample": True, "num_return_sequences": args.num_eval_samples}
    kind = "samples" if name == PLAIN else "draws"
    answers, scores = list[ScoredAnswer](), dict[str, list[float]]()
    for start in range(0, len(questions), args.per_device_eval_batch_size):
        batch = questions[start : start + args.per_device_eval_batch_size]
        prompts = [PROMPT.format(question.question) for question in batch]
        options = {"tokenizer": tokenizer, "max_new_tokens": how.max_new_tokens, "seed": args.eval_seed}
        best = generate(
            model, prompts, mixing="average", num_samples=several["num_samples"], do_sample=False, **options
        )
        others = generate(model, prompts, mixing="draws", equivalent=same, **{"do_sample": False, **several, **options})
        length = best.mask.sum(-1).clamp_min(1)
        scores.setdefault(f"{name}: token entropy", []).extend((best.total.sum(-1) / length).tolist())
        if name != PLAIN:
            scores.setdefault(f"{name}: epistemic", []).extend((best.epistemic.sum(-1) / length).tolist())
        scores.setdefault(f"{name}: disagreement of {kind}", []).extend((1 - others.agreement).tolist())
        scores.setdefault(f"{name}: entropy of {kind}", []).extend(others.semantic_entropy.tolist())
        rows = zip(
            batch, best.sequences[:, best.prompt_length :], best.mask, best.epistemic, best.aleatoric, strict=True
        )
        for question, ids, mask, epistemic, aleatoric in rows:
            pieces = reports.token_pieces(tokenizer, ids[mask].tolist())
            wrong = not any(same("".join(pieces), answer) for answer in question.answers)
            note = f"{question.group}; right: {' / '.join(question.answers)}" if question.answers else ""
            parts = [part[mask].float().cpu().numpy() for part in (epistemic, aleatoric)]
            answers.append(ScoredAnswer(question.question, pieces, *parts, note, wrong=wrong))
    return Answers(
        answers, np.array([one.wrong for one in answers]), {key: np.array(value) for key, value in scores.items()}
    )


# --- Results ---------------------------------------------------------------------------------------------------------
Scores = dict[str, NDArray[Any]]


def by_score(answers: dict[str, Answers]) -> tuple[Scores, Scores]:
    """All scores of both models, and which of their answers are wrong."""
    scores = {name: score for one in answers.values() for name, score in one.scores.items()}
    return scores, {name: one.wrong for one in answers.values() for name in one.scores}


def judge(
    answers: dict[str, Answers], limits: dict[str, float], questions: Sequence[Question], seed: int
) -> dict[str, Any]:
    """Which score tells wrong answers; and once more without questions on which entropy is no reason to doubt."""
    groups = np.array([question.group for question in questions])
    scores, wrong = by_score(answers)
    results: dict[str, Any] = {"groups": {}, "scores": reports.doubt_report(scores, wrong, limits, seed=seed)}
    results["gains"] = reports.doubt_gains(scores, wrong, EPISTEMIC, seed=seed)
    for name, one in answers.items():
        for group in dict.fromkeys(groups.tolist()):
            mask = groups == group
            entropies = {key: one.scores.get(f"{name}: {key}", np.zeros(len(mask))) for key in ENTROPIES}
            row = {"accuracy": 1 - one.wrong, **entropies}
            results["groups"][f"{name}, {group}"] = {key: float(value[mask].mean()) for key, value in row.items()}
    if people.MANY in groups:
        some = [{name: values[groups != people.MANY] for name, values in of.items()} for of in (scores, wrong)]
        rows = reports.doubt_report(*some, limits, seed=seed)
        results["without_many"] = {name: {k: row[k] for k in ("auroc", "interval")} for name, row in rows.items()}
    return results


def show(answer: ScoredAnswer, top: float) -> str:
    """An answer for the terminal, or its refusal."""
    colours = reports.takes_colours(sys.stdout)
    text = reports.coloured(answer.pieces, answer.epistemic, top=top, colours=colours).strip()
    return f"> {answer.question}\n  {REFUSED} ({text})" if answer.refused else f"> {answer.question}\n  {text}"


def with_refusals(answers: Answers, limit: float) -> list[ScoredAnswer]:
    """The answers of the Bayesian model; those whose epistemic uncertainty is above the limit are refused."""
    pairs = zip(answers.answers, answers.scores[EPISTEMIC], strict=True)
    return [replace(answer, refused=bool(score > limit)) for answer, score in pairs]


def top_of(answers: Sequence[ScoredAnswer]) -> float:
    """Nats of the strongest colour: few tokens are above."""
    return max(float(np.quantile(np.concatenate([np.asarray(a.epistemic) for a in answers]), 0.98)), 1e-3)


def report(folder: Path, results: dict[str, Any], test: dict[str, Answers], shown: Sequence[ScoredAnswer]) -> None:
    """Some answers and the tables on the screen; a page and a CSV of all answers, numbers as JSON, the figure."""
    top = results["top"]
    for group in dict.fromkeys(answer.note.partition(";")[0] for answer in shown):
        for answer in [one for one in shown if one.note.startswith(group)][:2]:
            print(f"{show(answer, top)}   [{answer.note}]")
    caption = f"Refused: above {results['threshold']:.3f} nats per token, chosen on validation questions."
    page = reports.token_page("Answers of a Bayesian LoRA", shown, top=top, caption=caption)
    (folder / "answers.html").write_text(page, encoding="utf-8")
    scores, wrong = by_score(test)
    columns = {**scores, **{f"{name}: wrong": one.wrong.astype(int) for name, one in test.items()}}
    values = zip(shown, *columns.values(), strict=True)
    rows = (
        {"question": one.question, "note": one.note, **dict(zip(columns, row, strict=True))} for one, *row in values
    )
    reports.write_rows(folder / "answers.csv", rows)
    figure, (panel,) = reports.plots.page("Which score knows that an answer is wrong?", 1, 1, figsize=(8, 5.5))
    confidences = {name: -score for name, score in scores.items() if "entropy of" not in name}
    reports.risk_coverage(panel, confidences, {name: wrong[name].astype(float) for name in confidences})
    tables = [reports.format_table(results[key], corner=corner) for key, corner in TABLES.items() if key in results]
    write_results(folder, results, {"lora_chat.png": figure}, *tables, also=["answers.html", "answers.csv", "adapter"])


# --- The run ---------------------------------------------------------------------------------------------------------
def fresh_adapter(base: Any, how: ChatArguments) -> nn.Module:
    """A LoRA of every linear layer."""
    sizes = {"r": how.lora_rank, "lora_alpha": 2 * how.lora_rank}
    return get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **sizes))


def train_bayesian(model: nn.Module, rows: Sequence[Question], tokenizer: Any, arguments: Arguments, **how: Any) -> Any:
    """An adapter becomes Bayesian as ``how`` says, is trained by the ELBO and saved."""
    given, args = arguments
    bayesian = to_bayesian(model, given.delta, **{**given.conversion, **how})
    changes = {"num_train_epochs": args.bayesian_epochs, "learning_rate": args.bayesian_learning_rate}
    train(bayesian, rows, tokenizer, args, **changes).save_model(str(Path(args.output_dir or ".") / "adapter"))
    return bayesian


def train_adapters(
    base: Any, rows: Sequence[Question], tokenizer: Any, arguments: Arguments, clock: experiments.Clock
) -> dict[str, Any]:
    """A LoRA without noise, and a copy of it that has become Bayesian and gone on by the ELBO."""
    how, args = arguments
    experiments.say(f"1. LoRA, without noise: {len(rows)} rows")
    plain = fresh_adapter(base, how)
    train(plain, rows, tokenizer, args)
    clock.lap("lora")
    experiments.say("2. The adapter becomes Bayesian, and goes on by the ELBO")
    conversion = {"target_modules": how.target_modules or ADAPTERS, "scale": "additive"}
    bayesian = train_bayesian(copy.deepcopy(plain), rows, tokenizer, arguments, **conversion)
    if how.export_draws and PartialState().is_main_process:
        export_draws(bayesian, how.export_draws, Path(args.output_dir or ".") / "draws", seed=args.eval_seed)
    clock.lap("elbo")
    return {PLAIN: plain, BAYESIAN: bayesian}


def chat(model: nn.Module, tokenizer: Any, arguments: Arguments, results: dict[str, Any]) -> None:
    """Answer the questions of ``--ask``, then those that are typed, until an empty line."""
    how = arguments[0]
    limit = -np.inf if results["threshold"] is None else results["threshold"]
    for question in (*how.ask, *(iter(sys.stdin.readline, "\n") if how.chat else ())):
        found = ask(BAYESIAN, model, [Question(question.strip(), (), "", "")], tokenizer, arguments)
        print(show(with_refusals(found, limit)[0], results["top"]), flush=True)


def reopen(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The Bayesian adapter of an earlier run over its base, the tokenizer and the results."""
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(f"`eval_only` {str(folder)!r} holds no results.json: name the --output_dir of a run.")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return from_pretrained(folder / "adapter"), AutoTokenizer.from_pretrained(folder / "adapter"), results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned, printed and written to ``--output_dir``."""
    arguments = how, args = parse_arguments(argv)
    logging.disable_progress_bar()
    set_seed(args.seed)
    folder, clock = Path(args.output_dir or "."), experiments.Clock()
    if how.eval_only is not None:
        with user_input():
            model, tokenizer, results = reopen(Path(how.eval_only))
        chat(model, tokenizer, arguments, results)
        return results
    with user_input():
        data = load_questions(how, args.seed)
        base, tokenizer = load_base(how, data, args, folder)
    clock.lap("base")
    if how.train_only:
        rest = {"freeze": False, "target_modules": how.target_modules or ["lora_A"]}  # a fresh B is 0
        train_bayesian(fresh_adapter(base, how), data["train"], tokenizer, arguments, **rest)
        return {"adapter": str(folder / "adapter")}
    models = train_adapters(base, data["train"], tokenizer, arguments, clock)

    experiments.say(f"3. Answers by {args.num_eval_samples} draws, and by as many samples of the plain model")
    set_seed(args.seed)
    chosen, test = (
        {name: ask(name, model, data[part], tokenizer, arguments) for name, model in models.items()}
        for part in ("validation", "test")
    )
    clock.lap("answers")
    scores, wrong = by_score(chosen)
    limits = {name: reports.refusal_threshold(s, wrong[name], how.target_accuracy) for name, s in scores.items()}
    results = {"seed": args.seed, "threshold": limits[EPISTEMIC], "arguments": asdict(how), "seconds": clock.seconds}
    results |= judge(test, limits, data["test"], args.seed)
    shown = with_refusals(test[BAYESIAN], limits[EPISTEMIC])
    results["top"] = top_of(shown)
    if not PartialState().is_main_process:
        return results
    report(folder, results, test, shown)
    chat(models[BAYESIAN], tokenizer, arguments, results)
    return results


if __name__ == "__main__":
    experiments.run_command(main)
