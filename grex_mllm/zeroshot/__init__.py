"""Multimodal language models asked without training: predictors of the one protocol, local or behind a server."""
