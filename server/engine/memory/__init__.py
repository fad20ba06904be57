"""How large the cache is: the largest steps are run, and what they leave is for keys and values."""
