"""What does a card say of the GPU path, in a quarter of an hour?"""
