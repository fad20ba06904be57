"""From logits to tokens: parameters, the mask of a grammar, on the host and on the device."""
