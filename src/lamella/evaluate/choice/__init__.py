"""Multiple choice by log-likelihood: which of the choices does a model find the likeliest continuation of a question?

Modules, in the order in which a task passes through them: `questions` (files), `sets` and `continuations` (by name),
`scoring` (log-likelihoods), `accuracy`, `expert_use`, `evaluate` (several models, one at a time), `harness` (tasks of
lm-evaluation-harness), `command` (tables, picture, JSON).
"""
