"""Results for people and machines: the JSON document, text, and verdicts of `check`.

Everything here is a pure function of what the planner returned.
"""
