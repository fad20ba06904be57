"""What clients of each dialect may send, lowered to the internal request. Imports no torch: workers read bodies."""
