"""RotaryEmbedding, the stand-alone module for models of one's own. The server does not use it."""
