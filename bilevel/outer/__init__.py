"""The outer loop: what is trained, how far each step solves, and what came of it."""
