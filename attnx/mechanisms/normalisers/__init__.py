"""How scores become weights: `attnx.attention.normalisers.Normaliser`.

Facts: `nonnegative`, no weight is below zero; `sums_to_one`, nor do the weights of a row that sees
a key sum to anything else; `shift_invariant`, adding a number to all scores of a row changes
nothing. An entry declares all that it keeps.
"""
