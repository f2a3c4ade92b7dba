"""The choice of each row's next token from its logits, after penalties and bans: greedy or drawn.

All in one kernel: as a graph of a library's ops it takes some 80, that hand little to each other.
"""
