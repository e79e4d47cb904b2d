"""Bridges to training stacks. Only the files here import transformers, accelerate or optimum-habana."""
