"""How well does each position method read a long text?"""
