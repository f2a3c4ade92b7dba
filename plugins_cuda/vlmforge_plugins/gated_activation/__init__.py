"""The gated activation of an MLP: half of a row through a function, times the other half.

Between two products it is all there is, and a library takes three passes over memory for it.
"""
