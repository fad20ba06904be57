"""What does a card say of the GPU path?"""
