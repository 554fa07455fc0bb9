"""Refinement: fidelities, the ladder they stand on, and the controllers that climb it."""
