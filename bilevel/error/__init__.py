"""What stopping early cost: estimates and bounds of a hypergradient's truncation error."""
