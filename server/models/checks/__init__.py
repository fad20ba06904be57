"""How a model is read and checked before it is served: what its layers do, by trial and against transformers."""
