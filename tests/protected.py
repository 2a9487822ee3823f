"""Which tests protect which property, from their marks: `python -m tests.protected` prints the index.

A property is what a defect of an older package got wrong. A test with `@pytest.mark.protects("name")` computes it on
the real code; those in files called `test_defects*` show besides that the defective formula fails the same check.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent

PROPERTIES = """
    kl_has_gradient kl_is_a_sum kl_counted_once nested_kl kl_not_multiplied_by_samples weight_decay_groups
    prior_scale_is_not_variance prior_scale_is_chosen prior_is_saved moped_copies moped_sets_prior
    init_does_not_alias zero_weights softplus_is_stable fan_in_init memory sizes_count_weights noise_is_fresh
    one_draw_per_forward mean_mode flipout_signs_per_example local_noise_per_position half_precision_zero_input
    groups multiplicative_zero one_draw_per_sequence lstm_is_a_lstm int8_bias avuc_runs conversion_by_class
    subclass_layers tied_weights same_activations wrapper_loses_api from_pretrained_restores
    average_probabilities uncertainty_is_batched ties_in_any_order inverse_of_factor draw_covariance no_prior
    no_n damping_split eval_mode exact_fisher three_dim_inputs every_token_counts batch_size_one
    padding_adds_no_curvature tied_curvature jvp_not_finite_difference eigen_draw evidence_sign
""".split()


def index() -> dict[str, list[str]]:
    """Property -> its tests, as `file::function`."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for name in _protected(node):
                    found.setdefault(name, []).append(f"{path.relative_to(TESTS)}::{node.name}")
    return found


def _protected(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.protects":
            yield from (str(ast.literal_eval(argument)) for argument in decorator.args)


if __name__ == "__main__":
    for name, tests in sorted(index().items()):
        print(name, *tests, sep="\n    ")
