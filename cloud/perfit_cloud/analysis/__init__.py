"""What a history changes in a model: δ-vectors of many users, and what their spectrum says about a shift.

A δ-vector is the mean, over one user's queries, of a block's output at the last token with retrieved
history before the query, minus that of the query alone (PerFit, section 3). `run` makes them and the
report; everything between is pure functions on arrays.
"""
