"""What predictions are worth: reports in numbers, tables, JSON, and figures."""

from .answers import AnswerComparison
from .comparison import Comparison, ReportedSet, csv_prefix, prediction_columns, standard_report, write_rows
from .doubts import doubt_gains, doubt_report, refusal_threshold
from .html import HtmlResults, html, rows_with_words
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
from .tagging import TaggingComparison
from .tokens import ScoredAnswer, coloured, takes_colours, token_page, token_pieces
from .words import event_reliability, word_strip

__all__ = [
    "GREY", "GROUP_COLOURS", "MEANINGLESS", "METHOD_COLOURS", "METHOD_LINES", "WARNING_COLOUR", "AnswerComparison",
    "ClassPredictions", "Comparison", "HtmlResults", "Interval", "Predictions", "Recalibrated", "RegressionPredictions",
    "ReportedSet", "Row", "ScoredAnswer", "TaggingComparison", "bootstrap_intervals", "classification_report",
    "coloured", "comparison_figure", "csv_prefix", "doubt_gains", "doubt_report", "event_reliability", "format_table",
    "group_histograms", "html", "legend_below", "majority_predictions", "ood_report", "panel_title",
    "prediction_columns", "recalibrate", "refusal_threshold", "regression_report", "reliability_diagram",
    "risk_coverage", "rows_with_words", "save_figure", "standard_report", "takes_colours", "tempered", "token_page",
    "token_pieces", "uncertainty_figure", "wilson_interval", "word_strip", "write_json", "write_rows",
]  # fmt: skip
