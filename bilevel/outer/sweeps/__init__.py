"""Sweeps: many runs of one task, on whatever there is to run them on."""
