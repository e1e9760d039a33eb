"""Results as files that other programs read: plan files, annotations, framework rules.

One module per format, each a pure function from a planned result to text; `files` writes.
"""
