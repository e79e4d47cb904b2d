"""What the result files say: derived figures, tables, plots, and the published figures beside ours."""
