"""Is it the same model, and how good is it: logit match, perplexity, routing controls."""
