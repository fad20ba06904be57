"""HTTP: request models, endpoints and the event stream. Knows the engine only through `AsyncEngine`."""
