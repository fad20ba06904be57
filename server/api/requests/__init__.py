"""What clients send: request models, their common checks, and prompts as token ids."""
