"""Do long prompts make short requests wait, and running streams stutter?"""
