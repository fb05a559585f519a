"""CI jobs of registry.yaml: what `weightsmith build` makes, why, and how it went.

plan.py     registry.yaml -> jobs, parents first
state.py    why a job has to run: its derivation against what is there
unit.py     one job: make it, judge it, move its aliases
gates.py    measurements and verdicts, kept with the result
run.py      the order of jobs, several at a time
report.py   the outcome as JUnit XML, Markdown and JSON
"""
