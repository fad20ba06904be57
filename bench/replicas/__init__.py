"""What several replicas behind a router give, and what they withstand."""
