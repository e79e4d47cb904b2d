"""Evaluates the result files: derived figures, tables, plots, and the published figures compared with ours."""
