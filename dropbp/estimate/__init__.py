"""Forecasts of memory and time, before training."""
