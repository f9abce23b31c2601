"""The research pipeline: both stages on LaMP's files, ablations, comparisons, and the paper's tables.

A method fits one person at a time and answers that person's queries; `run` knows no method from inside.
"""
