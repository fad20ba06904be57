"""What does a model still find, follow and count in a long prompt?"""
