"""Positions: frequencies, rotations, and the methods that say how a query reads raw keys. Knows torch only."""
