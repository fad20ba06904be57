"""How do several processes compute one model? Rank 0 is the server; the others follow its steps."""
