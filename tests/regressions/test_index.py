"""Which test protects which property: the index of the defects that older packages had, and of where each is tested.

A test of this folder computes the property on the real code and shows that the defective formula fails the same check;
the others, in the files of what they test, cover it more widely.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

INDEX: dict[str, tuple[str, ...]] = {
    # the variational objective
    "kl_has_gradient": (
        "regressions/test_variational.py::test_kl_has_gradient",
        "distributions/test_kl.py::test_kl_has_gradient",
        "test_objective.py::test_kl_has_gradient",
        "test_conversion_matrix.py::test_kl_has_gradient",
    ),
    "kl_is_a_sum": ("regressions/test_variational.py::test_kl_is_a_sum", "distributions/test_kl.py::test_kl_is_a_sum"),
    "kl_counted_once": (
        "regressions/test_variational.py::test_kl_counted_once",
        "nn/test_recurrent.py::test_kl_counted_once",
        "test_objective.py::test_kl_matches_reference",
    ),
    "nested_kl": ("regressions/test_variational.py::test_nested_kl", "test_objective.py::test_hand_built_layers"),
    "kl_not_multiplied_by_samples": (
        "regressions/test_training.py::test_kl_not_multiplied_by_samples",
        "training/test_exactness.py::test_live_noise_is_unbiased",
    ),
    "weight_decay_groups": (
        "regressions/test_training.py::test_weight_decay_groups",
        "training/test_optimizer.py::test_rho_has_its_own_learning_rate_and_no_decay",
    ),
    # priors, scales and initial values
    "prior_scale_is_not_variance": (
        "regressions/test_variational.py::test_prior_scale_is_not_variance",
        "distributions/test_kl.py::test_prior_scale_is_not_variance",
    ),
    "prior_scale_is_chosen": ("regressions/test_variational.py::test_prior_scale_is_chosen",),
    "prior_is_saved": (
        "regressions/test_variational.py::test_prior_is_saved",
        "distributions/test_priors.py::test_prior_is_saved",
        "test_checkpoint.py::test_prior_is_saved",
    ),
    "moped_copies": ("regressions/test_variational.py::test_moped_copies", "test_objective.py::test_moped_copies"),
    "moped_sets_prior": (
        "regressions/test_variational.py::test_moped_sets_prior",
        "test_objective.py::test_kl_is_zero_before_training",
    ),
    "init_does_not_alias": ("regressions/test_variational.py::test_init_does_not_alias",),
    "zero_weights": (
        "regressions/test_variational.py::test_zero_weights",
        "test_conversion.py::test_zero_weights",
        "distributions/test_priors.py::test_zero_weights",
    ),
    "softplus_is_stable": (
        "regressions/test_variational.py::test_softplus_is_stable",
        "distributions/test_diagonal_normal.py::test_softplus_is_stable",
    ),
    "fan_in_init": ("regressions/test_variational.py::test_fan_in_init", "nn/test_linear.py::test_like_torch"),
    "memory": ("regressions/test_variational.py::test_memory", "test_conversion.py::test_memory"),
    "sizes_count_weights": (
        "regressions/test_variational.py::test_sizes_count_weights",
        "test_summary.py::test_counts",
    ),
    # draws and estimators
    "noise_is_fresh": (
        "regressions/test_noise.py::test_noise_is_fresh",
        "nn/test_estimators.py::test_noise_is_fresh",
        "nn/test_conv.py::test_noise_is_fresh",
        "nn/test_recurrent.py::test_noise_is_fresh",
        "test_objective.py::test_noise_is_fresh",
        "test_conversion_matrix.py::test_noise_is_fresh",
    ),
    "one_draw_per_forward": (
        "regressions/test_noise.py::test_one_draw_per_forward",
        "test_objective.py::test_layer_used_twice_has_one_draw",
    ),
    "mean_mode": ("regressions/test_noise.py::test_mean_mode", "test_conversion_matrix.py::test_mean_mode"),
    "flipout_signs_per_example": (
        "regressions/test_noise.py::test_flipout_signs_per_example",
        "regressions/test_noise.py::test_signs_are_never_zero",
        "nn/test_estimators.py::test_flipout_signs_per_example",
        "nn/test_conv_estimators.py::test_flipout_signs_per_example",
    ),
    "local_noise_per_position": (
        "regressions/test_noise.py::test_local_noise_per_position",
        "nn/test_estimators.py::test_local_noise_per_position",
    ),
    "half_precision_zero_input": ("regressions/test_noise.py::test_half_precision_zero_input",),
    # layers
    "groups": ("regressions/test_layers.py::test_groups", "nn/test_conv.py::test_like_torch"),
    "multiplicative_zero": (
        "regressions/test_layers.py::test_multiplicative_zero",
        "nn/test_multiplicative.py::test_multiplicative_zero",
    ),
    "one_draw_per_sequence": ("nn/test_recurrent.py::test_one_draw_per_sequence",),
    "lstm_is_a_lstm": ("nn/test_recurrent.py::test_lstm_is_a_lstm",),
    # INT8
    "int8_bias": (
        "regressions/test_int8_bias.py::test_bias_of_five_stays_five",
        "regressions/test_int8_bias.py::test_every_layer_runs_without_bias",
        "regressions/test_int8_bias.py::test_signs_are_both",
        "regressions/test_int8_bias.py::test_any_architecture",
        "quantization/test_layers.py::test_mean_is_the_layer_with_rounded_weights",
    ),
    # losses
    "avuc_runs": (
        "regressions/test_losses.py::test_avuc_runs",
        "regressions/test_losses.py::test_avuc_is_differentiable",
        "regressions/test_losses.py::test_avuc_reduces_over_draws",
        "losses/test_avu.py::test_avuc_equals_a_loop",
    ),
    # conversion and checkpoints
    "conversion_by_class": (
        "regressions/test_conversion.py::test_conversion_by_class",
        "regressions/test_conversion.py::test_conversion_is_atomic",
        "test_conversion_matrix.py::test_converts_exactly_the_expected_layers",
    ),
    "subclass_layers": (
        "regressions/test_conversion.py::test_subclass_layers",
        "test_conversion.py::test_subclass_layers",
    ),
    "tied_weights": (
        "regressions/test_conversion.py::test_tied_weights",
        "test_conversion_matrix.py::test_tied_weights",
    ),
    "same_activations": (
        "regressions/test_conversion.py::test_same_activations",
        "test_conversion_matrix.py::test_no_noise_equals_deterministic",
    ),
    "wrapper_loses_api": (
        "regressions/test_conversion.py::test_wrapper_loses_api",
        "test_conversion_matrix.py::test_wrapper_loses_api",
    ),
    "from_pretrained_restores": (
        "regressions/test_conversion.py::test_from_pretrained_restores",
        "test_conversion_matrix.py::test_from_pretrained_restores",
    ),
    # predictions and metrics
    "average_probabilities": (
        "regressions/test_prediction.py::test_average_probabilities",
        "test_predictive.py::test_uncertainties_match_a_loop",
    ),
    "uncertainty_is_batched": ("regressions/test_prediction.py::test_uncertainty_is_batched",),
    "ties_in_any_order": (
        "regressions/test_prediction.py::test_ties_in_any_order",
        "metrics/test_selective.py::test_ties_are_the_mean_over_their_orders",
    ),
    # Laplace
    "inverse_of_factor": ("regressions/test_laplace.py::test_inverse_of_factor",),
    "draw_covariance": (
        "regressions/test_laplace.py::test_draw_covariance",
        "laplace/test_facts.py::test_draws_have_the_posterior_covariance",
    ),
    "no_prior": ("regressions/test_laplace.py::test_no_prior",),
    "no_n": (
        "regressions/test_laplace.py::test_no_n",
        "laplace/test_facts.py::test_fit_takes_the_whole_dataset_as_the_sum",
    ),
    "damping_split": (
        "regressions/test_laplace.py::test_damping_split",
        "laplace/test_facts.py::test_determinant_marginals_and_the_damping_split",
    ),
    "eval_mode": (
        "regressions/test_laplace.py::test_eval_mode",
        "laplace/test_any_module.py::test_dropout_is_off_and_training_flags_come_back",
    ),
    "exact_fisher": (
        "regressions/test_laplace.py::test_exact_fisher",
        "laplace/test_fisher.py::test_exact_needs_no_labels",
    ),
    "three_dim_inputs": ("regressions/test_laplace.py::test_three_dim_inputs",),
    "every_token_counts": ("regressions/test_laplace.py::test_every_token_counts",),
    "batch_size_one": (
        "regressions/test_laplace.py::test_batch_size_one",
        "laplace/test_curvature.py::test_uneven_batches_and_merged_processes_are_one_batch",
    ),
    "padding_adds_no_curvature": (
        "regressions/test_laplace.py::test_padding_adds_no_curvature",
        "laplace/test_accumulate.py::test_padding_adds_nothing",
    ),
    "tied_curvature": (
        "regressions/test_laplace.py::test_tied_curvature",
        "laplace/test_accumulate.py::test_reused_and_shared_layers",
    ),
    "jvp_not_finite_difference": ("regressions/test_laplace.py::test_jvp_not_finite_difference",),
    "eigen_draw": (
        "regressions/test_laplace.py::test_eigen_draw",
        "regressions/test_laplace.py::test_first_direction_is_the_least_determined",
        "laplace/test_directions.py::test_draws_lie_on_the_line_and_have_its_variance",
    ),
    "evidence_sign": (
        "regressions/test_laplace.py::test_evidence_sign",
        "laplace/test_facts.py::test_the_evidence_is_exact_at_the_map",
    ),
}


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", INDEX)
def test_index_names_tests(name: str) -> None:
    """Every entry is a test that exists."""
    for entry in INDEX[name]:
        path, function = entry.split("::")
        assert function in names_in(TESTS / path), entry


def test_every_regression_is_listed() -> None:
    listed = {entry for entries in INDEX.values() for entry in entries}
    for path in Path(__file__).parent.glob("test_*.py"):
        if path != Path(__file__):
            found = {f"regressions/{path.name}::{name}" for name in names_in(path) if name.startswith("test_")}
            assert found <= listed, found - listed
