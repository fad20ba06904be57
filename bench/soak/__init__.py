"""Does a server leak, grow, or leave anybody without an answer?"""
