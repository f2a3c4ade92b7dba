"""Where the GPUs of one host meet: sums and gathers through memory that all of them see.

Of small messages, where a library's way takes longer than the messages do.
"""
