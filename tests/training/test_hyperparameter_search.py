"""`Trainer.hyperparameter_search` with optuna: what a trial is judged by, what it may set, and how it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna

from bayeformers import BayesianTrainer, bayesian_config, to_bayesian
from tests.training import tiny

optuna.logging.set_verbosity(optuna.logging.WARNING)

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def search(trainer: BayesianTrainer, **kwargs: Any) -> Any:
    defaults: dict[str, Any] = {
        "hp_space": lambda trial: {"rho_learning_rate": trial.suggest_float("rho_learning_rate", 1e-3, 1e-1)},
        "compute_objective": lambda metrics: metrics["eval_nll"],
        "direction": "minimize",
        "backend": "optuna",
        "n_trials": 2,
        "sampler": optuna.samplers.RandomSampler(seed=0),
    }
    return trainer.hyperparameter_search(**{**defaults, **kwargs})


def kept(seen: list[Any]) -> Callable[[dict[str, float]], float]:
    """An objective that keeps what it is given."""

    def objective(metrics: dict[str, float]) -> float:
        seen.append(metrics)
        return metrics["eval_nll"]

    return objective


def test_delta_is_chosen_in_model_init_and_rates_in_the_space(tmp_path: Path) -> None:
    """Both suggest from the same trial; no name but those of arguments reaches the arguments."""
    deltas, rates = [], []

    def model_init(trial: Any = None) -> Any:
        delta = 0.2 if trial is None else trial.suggest_float("delta", 0.05, 0.5, log=True)
        return to_bayesian(tiny.plain(), delta, freeze=False)

    class Watched(BayesianTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            deltas.append(bayesian_config(self.model).delta)
            rates.append(optimizer.param_groups[-1]["lr"])
            return optimizer

    trainer = tiny.trainer(tmp_path, model_init=model_init, max_steps=1)
    trainer.__class__ = Watched
    study = {"study_name": "tiny", "storage": f"sqlite:///{tmp_path / 'study.db'}", "load_if_exists": True}
    best = search(trainer, n_trials=3, **study)
    trials = optuna.load_study(study_name="tiny", storage=study["storage"]).trials
    assert [trial.params["delta"] for trial in trials] == deltas and len(set(deltas)) == 3
    assert [trial.params["rho_learning_rate"] for trial in trials] == rates
    assert best.objective == min(trial.value for trial in trials)
    assert best.hyperparameters == trials[int(best.run_id)].params


def test_a_trial_is_judged_by_the_model_that_it_keeps_with_all_draws(tmp_path: Path) -> None:
    """At a learning rate this large the last epoch is the worst; the evaluations inside `train` are for pruning."""
    seen: list[dict[str, float]] = []
    trainer = tiny.trainer(
        tmp_path, model_init=lambda: tiny.bayesian(), max_steps=2, learning_rate=3.0, load_best_model_at_end=True,
        metric_for_best_model="eval_nll", greater_is_better=False, num_eval_samples=7,
        num_eval_samples_during_training=3, **EACH_STEP,
    )  # fmt: skip
    best = search(trainer, n_trials=1, compute_objective=kept(seen))
    during = [metrics["eval_nll"] for metrics in seen[:-1]]
    assert len(during) == 2 and during[-1] > 1.5 * min(during)
    kept_model = tiny.bayesian()
    step = 1 + during.index(min(during))
    again = tiny.trainer(tmp_path / "again", kept_model, num_eval_samples=7)
    again._load_from_checkpoint(str(tmp_path / "run-0" / f"checkpoint-{step}"))
    assert best.objective == pytest.approx(again.evaluate()["eval_nll"], rel=1e-5)
    assert best.objective != pytest.approx(min(during), rel=1e-5), "the draws are others, so is the estimate"


@pytest.mark.parametrize("own", [{}, {"accuracy": 3.0}, {"accuracy": 3.0, "nll": 4.0}])
@pytest.mark.parametrize("several", [False, True])
def test_the_default_objective_is_the_loss_or_the_sum_of_the_users_own_metrics(
    several: bool, own: dict[str, float], tmp_path: Path
) -> None:
    """As in the stock search, which knows none of the metrics that our evaluation adds; several datasets are summed."""
    data: Any = tiny.dataset("single", 9, seed=5)
    data = {"a": data, "b": tiny.dataset("single", 9, seed=6)} if several else data
    trainer = tiny.trainer(
        tmp_path, model_init=lambda: tiny.bayesian(), max_steps=1, eval_dataset=data,
        compute_metrics=(lambda _: own) if own else None,
    )  # fmt: skip
    seen: list[dict[str, float]] = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: seen.append(evaluate(*args, **kwargs)) or seen[-1]
    best = search(trainer, n_trials=1, compute_objective=None)
    found = seen[-1]
    losses = [value for name, value in found.items() if name.endswith("_loss")]
    assert len(losses) == 1 + several and sum(name.endswith("_ece") for name in found) == 1 + several
    of_the_loss = sum(losses) if several or not own else 0.0  # stock adds "eval_a_loss" to metrics, "eval_loss" not
    assert best.objective == pytest.approx(of_the_loss + sum(own.values()) * (1 + several), rel=1e-6)


def test_a_pruned_trial_leaves_the_trainer_as_a_finished_one_does(tmp_path: Path) -> None:
    """The second trial is stopped; an evaluation after the search takes all draws again."""

    class AllButTheFirst(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number > 0

    trainer = tiny.trainer(
        tmp_path, model_init=lambda: tiny.bayesian(), max_steps=3, num_eval_samples=7,
        num_eval_samples_during_training=2, **EACH_STEP,
    )  # fmt: skip
    storage = optuna.storages.InMemoryStorage()
    search(trainer, pruner=AllButTheFirst(), storage=storage, study_name="pruned")
    trials = optuna.load_study(study_name="pruned", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED"]
    assert [sorted(trial.intermediate_values) for trial in trials] == [[1, 2, 3], [1]]
    assert not trainer.is_in_train and trainer._num_samples() == 7


def test_whole_numbers_among_the_arguments_are_searched_as_fractions(tmp_path: Path) -> None:
    """The stock search casts to the type of the old value: int(0.25) would switch the KL off."""
    trainer = tiny.trainer(tmp_path, model_init=lambda: tiny.bayesian(), max_steps=1, kl_weight=1, kl_warmup_ratio=0)
    space = {"kl_weight": 0.25, "kl_warmup_ratio": 0.5}
    search(trainer, n_trials=1, hp_space=lambda trial: space)
    assert (trainer.args.kl_weight, trainer.args.kl_warmup_ratio) == (0.25, 0.5)


def test_a_value_out_of_range_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, model_init=lambda: tiny.bayesian(), max_steps=1)
    with pytest.raises(ValueError, match=r"`kl_weight` must be a finite number >= 0, got -1\.0"):
        search(trainer, hp_space=lambda trial: {"kl_weight": -1.0})


def test_unused_parameters_are_not_searched_for_with_a_model_init(tmp_path: Path) -> None:
    """As with a model: DistributedDataParallel would mark a layer that only the KL reaches as ready twice."""
    converted = tiny.trainer(tmp_path, model_init=lambda: tiny.bayesian())
    plain = tiny.trainer(tmp_path, model_init=lambda: tiny.plain())
    for trainer, expected in ((converted, False), (plain, None)):
        assert trainer.args.ddp_find_unused_parameters is expected
    assert converted.accelerator.ddp_handler.find_unused_parameters is False
