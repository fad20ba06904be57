"""What reaches attention in a model: raw queries, keys and values, through one interface."""
