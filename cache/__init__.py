"""Un-rotated keys and values in blocks, and the attention that reads them. Imports `rope`, never the server."""
