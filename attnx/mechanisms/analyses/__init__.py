"""Numbers and maps read off what `attnx.analysis.observe` saw: `seen -> arrays`, pure functions.

Facts say what the result looks like. `by_layer`, a dictionary with an array for each layer, by its
path; else one array for all. `by_example`, their first axis is that of the batch; else the result
is of the whole batch. `by_head`, the axis after that is that of heads; else heads count together,
and their order does not matter.
"""
