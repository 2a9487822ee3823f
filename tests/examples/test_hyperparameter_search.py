"""The search end to end, at a reduced size: what a study keeps, how it goes on, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("optuna")

import optuna
from optuna.trial import FixedTrial

from bayeformers.distributions import MopedPrior, NormalPrior
from bayeformers.experiments import parse_prior, study
from bayeformers.experiments.space import Space, converted_by
from bayeformers.experiments.study import NAME, best_found, done, storage_of, trial_seed
from bayeformers.reports.search import BEST, DEFAULTS
from examples.hyperparameter_search import fresh_start, main, parse_arguments, setting_report

SMALL = [
    "--max_train_samples", "48", "--max_eval_samples", "40", "--num_train_epochs", "1", "--bayesian_epochs", "2",
    "--num_eval_samples", "3", "--num_eval_samples_during_training", "2", "--startup_trials", "1", "--no_prune",
    "--use_cpu", "--disable_tqdm", "true",
]  # fmt: skip
WITHOUT_CONFIRMATION = ["--confirm_seeds", "0"]
Outcome = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two trials."""
    folder = tmp_path_factory.mktemp("search")
    return main([*SMALL, *WITHOUT_CONFIRMATION, "--n_trials", "2", "--output_dir", str(folder)]), folder


@pytest.fixture(scope="module")
def resumed(interrupted: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same study with a total of three, confirmed."""
    folder = tmp_path_factory.mktemp("resumed") / "search"
    shutil.copytree(interrupted[1], folder)
    return main([*SMALL, "--n_trials", "3", "--confirm_seeds", "2", "--output_dir", str(folder)]), folder


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=storage_of(folder))


def weights_of(folder: Path) -> bytes:
    return (folder / "deterministic" / "model.safetensors").read_bytes()


@pytest.fixture
def without_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a trial does here."""
    monkeypatch.setattr("bayeformers.reports.save_figure", lambda *_, **__: None)


# --- Trials ----------------------------------------------------------------------------------------------------------
def test_the_first_trial_is_the_defaults(interrupted: Outcome) -> None:
    results, folder = interrupted
    assert results["defaults"] == results["trials"][0]
    assert results["defaults"]["setting"] == {
        "delta": 0.4, "prior": "normal", "prior_std": 0.1, "learning_rate": 1e-3, "rho_learning_rate": 0.01,
        "kl_weight": 0.003,
    }  # fmt: skip
    assert [row["is_default"] for row in results["trials"]] == [True, False]
    written = json.loads((folder / "results.json").read_text())
    assert written["trials"] == results["trials"]
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "checkpoints").glob("search*")), "a trial's checkpoints are gone with it"


def test_a_trial_is_the_training_that_confirms_it(interrupted: Outcome, tmp_path: Path) -> None:
    """From the same model, seed and data, both ways of training a setting give the same validation NLL."""
    results, folder = interrupted
    arguments = parse_arguments([*SMALL, "--output_dir", str(tmp_path)])
    fresh = fresh_start(arguments.training.seed, arguments)
    shutil.copytree(folder / "deterministic", fresh.experiment.folder / "deterministic")
    for row in results["trials"]:
        report = setting_report(fresh, row["setting"])
        assert report["validation_nll"] == pytest.approx(row["validation_nll"], abs=1e-5)


def test_going_on_repeats_nothing(interrupted: Outcome, resumed: Outcome) -> None:
    (before, folder), (after, further) = interrupted, resumed
    assert len(after["trials"]) == 3 and after["trials"][:2] == before["trials"]
    assert weights_of(folder) == weights_of(further)
    trials_before, trials_after = study_in(folder).trials, study_in(further).trials
    assert [t.datetime_complete for t in trials_after[:2]] == [t.datetime_complete for t in trials_before]
    assert after["best"] == min(after["trials"][1:], key=lambda row: row["validation_nll"])


@pytest.mark.usefixtures("without_figure")
def test_a_killed_trial_fails_and_is_tried_again(interrupted: Outcome, resumed: Outcome, tmp_path: Path) -> None:
    """What was running counts for nothing, and the study comes to the same trials as the one that was not killed."""
    folder = tmp_path / "search"
    shutil.copytree(interrupted[1], folder)
    arguments = parse_arguments([*SMALL, "--output_dir", str(folder)])
    sampler = optuna.samplers.TPESampler(seed=trial_seed(arguments.training.seed, 2), n_startup_trials=1)
    stored = optuna.load_study(study_name=NAME, storage=storage_of(folder), sampler=sampler)
    killed = arguments.space(delta=0.4).suggest(stored.ask())
    after = main([*SMALL, *WITHOUT_CONFIRMATION, "--n_trials", "3", "--output_dir", str(folder)])
    assert [trial.state.name for trial in stored.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert len(after["trials"]) == 3 and after["trials"][2]["setting"] == killed
    expected = resumed[0]["trials"][2]
    assert after["trials"][2]["setting"] == expected["setting"]
    assert after["trials"][2]["validation_nll"] == pytest.approx(expected["validation_nll"], abs=1e-6)


@pytest.mark.usefixtures("without_figure")
def test_pruned_trials_count_and_are_no_best(
    interrupted: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Every(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return True

    folder = tmp_path / "search"
    shutil.copytree(interrupted[1], folder)
    monkeypatch.setattr(study, "make_pruner", lambda *_: Every())
    results = main([*SMALL, *WITHOUT_CONFIRMATION, "--n_trials", "3", "--output_dir", str(folder)])
    stopped = results["trials"][2]
    assert stopped["state"] == "pruned" and math.isfinite(stopped["validation_nll"])
    assert stopped["steps"] < results["trials"][1]["steps"]
    assert results["best"] == results["trials"][1]
    assert "2 pruned" in capsys.readouterr().out
    assert best_found([trial for trial in done(study_in(folder)) if trial.number != 1]) is None


# --- Confirmation ----------------------------------------------------------------------------------------------------
def test_confirmation_is_paired_on_fresh_seeds(resumed: Outcome) -> None:
    results, folder = resumed
    confirmed = results["confirmation"]
    assert confirmed["seeds"] == [1042, 1043]
    assert list(confirmed["methods"]) == ["deterministic", "deterministic + temperature", DEFAULTS, BEST]
    nll = {name: [report["nll"] for report in reports] for name, reports in confirmed["methods"].items()}
    differences = [best - own for best, own in zip(nll[BEST], nll[DEFAULTS], strict=True)]
    assert confirmed["difference"]["nll"]["mean"] == pytest.approx(sum(differences) / 2)
    assert confirmed["difference"]["nll"]["standard_error"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
    assert len({value for values in nll.values() for value in values}) == 8, "every seed has its own data and models"
    for seed in confirmed["seeds"]:
        number = results["best"]["number"]
        kept = json.loads((folder / "confirm" / f"seed-{seed}" / f"trial-{number}.json").read_text())
        assert kept == confirmed["methods"][BEST][seed - 1042]


# --- What is refused -------------------------------------------------------------------------------------------------
def test_another_setting_in_the_same_folder_is_refused(interrupted: Outcome) -> None:
    _, folder = interrupted
    before = len(study_in(folder).trials)
    with pytest.raises(ValueError, match="holds a study with bayesian_epochs=2.0, got 3.0: its trials are compared"):
        main([*SMALL, "--bayesian_epochs", "3", "--output_dir", str(folder)])
    with pytest.raises(ValueError, match="holds a study with delta=0.4, got 0.3"):
        main([*SMALL, "--delta", "0.3", "--output_dir", str(folder)])
    assert len(study_in(folder).trials) == before


def test_another_deterministic_model_in_the_same_folder_is_refused(interrupted: Outcome, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    shutil.copytree(interrupted[1], folder)
    file = folder / "deterministic" / "model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    with pytest.raises(ValueError, match="does not hold the model that the trials of this study start from"):
        main([*SMALL, "--n_trials", "3", "--output_dir", str(folder)])
    shutil.rmtree(folder / "deterministic")
    with pytest.raises(ValueError, match="does not hold the model"):
        main([*SMALL, "--n_trials", "3", "--output_dir", str(folder)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_trials", "1"], "`n_trials` must be at least 2, got 1"),
        (["--confirm_seeds", "1"], "`confirm_seeds` must be 0 .* or at least 2, got 1"),
        (["--search", "delta", "tau"], "`search` must name some of delta, prior, .* got tau"),
        (["--space", "{"], "`space` '{' is not JSON"),
        (["--space", '{"delta": 0.1}'], "`space` must be a JSON object of lists"),
        (["--space", '{"delta": [0.5, 0.1]}'], r"`space` must give delta as \[low, high\] with 0 < low < high"),
        (["--space", '{"width": [1, 2]}'], "`space` has width, which is not searched; searched are delta, prior_std"),
        (["--space", '{"prior": ["cauchy"]}'], r"`space` has unknown kinds of prior \['cauchy'\]"),
        (["--prior", "scale_mixture"], "`prior` 'scale_mixture' is none of those that can be searched"),
        (["--search", "learning_rate", "--freeze"], "`learning_rate` moves the means, which are frozen"),
        (["--kl_weight", "0"], "`kl_weight` is 0, which a logarithmic scale does not hold"),
        (["--method", "laplace"], "`method` must be variational, got 'laplace'"),
        (["--bayesian_epochs", "0"], "`bayesian_epochs` must be > 0"),
        (["--eval_only", "outputs"], "`eval_only` has no meaning in a search"),
        (["--task_name", "rte"], "`model_name_or_path` is needed for the task rte"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(flags: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    with pytest.raises(ValueError, match=message):
        main([*SMALL, "--output_dir", str(folder), *flags])
    assert not folder.exists()


# --- The space -------------------------------------------------------------------------------------------------------
def space_of(*flags: str) -> Space:
    return parse_arguments(flags).space(delta=0.4)


def test_every_number_is_searched_around_its_default() -> None:
    space = space_of()
    assert space.priors == ("normal", "moped")
    expected = {
        "delta": (0.1, 1.6), "prior_std": (0.01, 1.0), "prior_relative_scale": (0.1, 10.0),
        "learning_rate": (2e-4, 5e-3), "rho_learning_rate": (1e-3, 0.1), "kl_weight": (1e-4, 0.09),
    }  # fmt: skip
    assert list(space.ranges) == list(expected)
    for name, ends in expected.items():
        assert space.ranges[name] == pytest.approx(ends)


def test_a_given_range_is_widened_to_the_default() -> None:
    space = space_of("--space", '{"delta": [0.5, 0.9], "prior": ["normal_pretrained"]}')
    assert space.ranges["delta"] == (0.4, 0.9)
    assert space.priors == ("normal", "normal_pretrained") and "prior_relative_scale" not in space.ranges
    space = space_of("--space", '{"prior_relative_scale": [2, 5]}')
    assert space.ranges["prior_relative_scale"] == (2, 5), "the default is another kind of prior"


def test_a_trial_has_the_scale_of_its_own_prior_alone() -> None:
    arguments = parse_arguments(["--search", "prior"])
    space = arguments.space(delta=0.4)
    setting = space.suggest(FixedTrial({"prior": "moped", "prior_relative_scale": 2.0}))
    assert "prior_std" not in setting and setting["delta"] == 0.4 and setting["kl_weight"] == 0.003
    assert parse_prior(converted_by(setting, arguments.model).prior) == MopedPrior(2.0)
    setting = space.suggest(FixedTrial({"prior": "normal", "prior_std": 0.2}))
    assert parse_prior(converted_by(setting, arguments.model).prior) == NormalPrior(0.2, centre=0.0)


def test_what_is_not_searched_stays_as_the_flags_say() -> None:
    arguments = parse_arguments(["--search", "delta", "--prior", "scale_mixture"])
    space = arguments.space(delta=0.4)
    setting = space.suggest(FixedTrial({"delta": 0.2}))
    assert setting == {"delta": 0.2, "learning_rate": 1e-3, "rho_learning_rate": 0.01, "kl_weight": 0.003}
    assert space.searched_defaults == {"delta": 0.4}
    assert converted_by(setting, arguments.model).prior == "scale_mixture"


# --- GLUE tasks ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("without_figure")
def test_a_task_of_official_files(interrupted: Outcome, tmp_path: Path) -> None:
    """Frozen means: no learning rate to search; delta is calibrated, for the first trial."""
    header = "index\tsentence1\tsentence2\tlabel"
    for name, count in (("train", 40), ("dev", 12)):
        rows = [
            f"{i}\tThe dog sleeps .\tThe dog is {i} .\t{('not_' if i % 2 else '') + 'entailment'}" for i in range(count)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n")
    model = str(interrupted[1] / "deterministic")
    results = main([
        *SMALL, *WITHOUT_CONFIRMATION, "--task_name", "rte", "--data_dir", str(tmp_path), "--n_trials", "2",
        "--model_name_or_path", model, "--validation_share", "0.25", "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    setting = results["defaults"]["setting"]
    assert setting["prior"] == "moped" and setting["prior_relative_scale"] == 1.0 and 0.01 <= setting["delta"] <= 1
    assert "learning_rate" not in results["space"]
    assert results["trials"][1]["setting"]["learning_rate"] == setting["learning_rate"]
