"""Work whose size a client chooses, in processes that can be killed."""
