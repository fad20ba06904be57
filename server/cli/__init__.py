"""`prerope` on the command line: `serve`, `chat`, `complete`, `methods`; all but `serve` are clients of a server."""
