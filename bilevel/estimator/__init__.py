"""Hypergradient estimators, one a file."""
