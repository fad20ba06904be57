"""The inference server: settings, engine and HTTP. Imports `cache` and `rope`, never the other way round."""
