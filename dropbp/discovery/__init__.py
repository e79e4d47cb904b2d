"""Finds the residual branches of a model from one recorded forward."""
