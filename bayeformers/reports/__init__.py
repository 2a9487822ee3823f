"""What predictions are worth: reports in numbers, tables, JSON, and figures."""

from .comparison import Comparison, ReportedSet, csv_prefix, prediction_columns, standard_report, write_rows
from .plots import (
    GREY,
    GROUP_COLOURS,
    MEANINGLESS,
    METHOD_COLOURS,
    METHOD_LINES,
    WARNING_COLOUR,
    comparison_figure,
    group_histograms,
    legend_below,
    panel_title,
    reliability_diagram,
    risk_coverage,
    save_figure,
    uncertainty_figure,
    wilson_interval,
)
from .recalibration import Recalibrated, recalibrate, tempered
from .report import (
    ClassPredictions,
    Interval,
    Predictions,
    RegressionPredictions,
    Row,
    bootstrap_intervals,
    classification_report,
    format_table,
    majority_predictions,
    ood_report,
    regression_report,
    write_json,
)

__all__ = [
    "GREY", "GROUP_COLOURS", "MEANINGLESS", "METHOD_COLOURS", "METHOD_LINES", "WARNING_COLOUR", "ClassPredictions",
    "Comparison", "Interval", "Predictions", "Recalibrated", "RegressionPredictions", "ReportedSet", "Row",
    "bootstrap_intervals", "classification_report", "comparison_figure", "csv_prefix", "format_table",
    "group_histograms", "legend_below", "majority_predictions", "ood_report", "panel_title", "prediction_columns",
    "recalibrate", "regression_report", "reliability_diagram", "risk_coverage", "save_figure", "standard_report",
    "tempered", "uncertainty_figure", "wilson_interval", "write_json", "write_rows",
]  # fmt: skip
