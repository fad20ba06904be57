"""The OpenAPI document, and the shapes of replies that it shows."""
