"""Flags: priors, prior precisions, a file of arguments, and defaults by the kind of data."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from bayeformers.experiments import ExperimentParser, LaplaceArguments, parse_prior, parse_prior_precision


@dataclass
class Flags:
    epochs: int = 1
    share: float = 0.5


def parse_arguments(argv: list[str]) -> Flags:
    parser = ExperimentParser([Flags], {"digits": {"epochs": 30}, "others": {"epochs": 20}}, "digits")
    parser.add_config(argv)
    (flags,) = parser.parse(argv)
    return flags


def test_the_command_line_wins_over_the_file_and_the_file_over_the_kind(tmp_path: Path) -> None:
    assert parse_arguments([]) == Flags(30)
    path = tmp_path / "config.json"
    path.write_text('{"epochs": 7, "share": 0.25}')
    assert parse_arguments(["--config", str(path), "--share", "0.75"]) == Flags(7, 0.75)


def test_config_errors_are_clear(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        parse_arguments(["--config", str(tmp_path / "none.json")])
    path = tmp_path / "config.json"
    for text, message in [("{", "is not JSON"), ("[]", "must hold one JSON object"), ('{"dleta": 1}', "keys: dleta")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_arguments(["--config", str(path)])


def test_priors_by_name_and_by_json() -> None:
    assert parse_prior('{"type": "normal", "std": 0.5}').to_dict()["std"] == 0.5
    with pytest.raises(ValueError, match="unknown type 'laplace'"):
        parse_prior("laplace")
    with pytest.raises(ValueError, match="is not JSON"):
        parse_prior("{moped")


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "evidence"])
def test_prior_precisions_by_name_or_number(text: str) -> None:
    assert [parse_prior_precision(given) for given in ("marglik_per_layer", "2.5")] == ["marglik_per_layer", 2.5]
    with pytest.raises(ValueError, match=f"`prior_precision` must be one of .*marglik.* number > 0, got '{text}'"):
        LaplaceArguments(prior_precision=text)
