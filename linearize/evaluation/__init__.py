"""What `linearize eval` measures: one file a measurement, and the suites, weights and stages around them."""
