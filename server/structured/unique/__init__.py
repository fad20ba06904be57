"""Holds a reply to what a grammar cannot: that items, or names, differ from each other.

    items    what items may be so that they can be held to differ, and how many there are          as a schema is read
    places   where in a document that is asked for                                                 as it is compiled
    follow   where a reply stands in its document, byte by byte
    seen     what was written there, and which beginnings have no other end
    mask     which tokens are taken out of the grammar's mask for that

Each value has one text there (no `1.0` beside `1`, no `\\u0061` beside `a`), so values differ where their texts do. No
reply is led to where nothing can follow: every byte that matters is a token of its own, so what must be seen to is
that each text can be ended by some byte, and `seen` knows the beginnings whose every end was written. Where that
cannot be promised, `items` says so and the schema is refused.
"""
