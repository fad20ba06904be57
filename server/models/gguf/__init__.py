"""GGUF files: read once, joined where they are split, and converted to ordinary checkpoints."""
