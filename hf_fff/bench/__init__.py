"""What the numbers in the README and the docs come from. Never run by the tests as timings."""
