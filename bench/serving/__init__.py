"""How fast is a server beside its peers?"""
