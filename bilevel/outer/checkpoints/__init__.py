"""Checkpoints: states of a run on disk that survive what machines do to them."""
