"""From tokens to text to events."""
