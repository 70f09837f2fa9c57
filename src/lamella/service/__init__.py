"""The service: submit, watch, cancel and resume jobs, on this machine or a cluster. Imports no torch.

states.py    what a run may be, and what may follow
jobs.py      what may be submitted: one section per kind of job, never a shell command
store.py     the database: runs, attempts, events, keys; every change of state is one compare-and-swap
executors/   where jobs run: local, slurm, kubernetes, skypilot
scheduler.py what is desired against what is observed
app.py       HTTP under /v1
"""
