"""Models that are served: a GGUF file, computed by llama.cpp, and an endpoint that speaks OpenAI's protocol.

Modules: `names` (what is a served model, its tokenizer), `endpoint` (requests, and what goes wrong with them),
`dialects` (log-probabilities of given tokens from a server), `measure` (what `lamella evaluate` does with them).
"""
