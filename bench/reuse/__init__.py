"""What reading documents on their own costs in quality, and saves in time."""
