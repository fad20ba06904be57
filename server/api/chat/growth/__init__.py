"""How long a chat template's text may become, from the template alone: an upper bound, before it is run for anybody."""
