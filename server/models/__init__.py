"""Models: found, loaded, inspected, checked against transformers, and given faster forwards. Knows no scheduling."""
