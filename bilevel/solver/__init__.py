"""Inner solvers, one a file, and the one loop that runs them all."""
