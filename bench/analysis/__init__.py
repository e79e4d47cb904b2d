"""Gradients by path length, bias and variance of each mask sampler, and sensitivities."""
