"""HTTP under the app: a server that drains, its connections, and what comes in over them."""
