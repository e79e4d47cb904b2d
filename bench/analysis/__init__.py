"""Where a model's gradient comes from, what each way to draw masks makes of it, and what sensitivities say."""
