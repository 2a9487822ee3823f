"""`util`: uncertainty of Monte-Carlo predictions. `avuc_loss`, `uncertainty_calibration_loss`: calibration losses."""
