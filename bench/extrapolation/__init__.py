"""Do Su's extrapolation tables hold for small models trained from scratch?"""
